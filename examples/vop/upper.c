/* A virtio device in C: it answers each request in upper case, after a greeting from its configuration.
 *   upper /run/user/1000/micemu/default/mic0/vop.sock
 * Build: cc upper.c $(micemu vop --cflags --libs) -o upper
 * SIGTERM takes the device away; SIGHUP gives it another greeting. */
#include <ctype.h>
#include <errno.h>
#include <mic_vop.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

static volatile sig_atomic_t ending, greet;

static void on_signal(int number)
{
	*(number == SIGHUP ? &greet : &ending) = 1;
}

static void answer(struct mic_vop *f, const struct mic_vop_chain *chain, const char *greeting)
{
	char text[4096];
	size_t n = mic_vop_write(chain, 0, greeting, strlen(greeting));
	size_t len = mic_vop_read(chain, 0, text, sizeof text);

	for (size_t i = 0; i < len; i++)
		text[i] = (char)toupper((unsigned char)text[i]);
	n += mic_vop_write(chain, n, text, len);
	mic_vop_push(f, chain, (uint32_t)n);
}

int main(int argc, char **argv)
{
	static struct mic_vop_chain chain;
	char greeting[8] = "hello: ";
	struct mic_vop_device device = {42, 1, 16, 0, greeting, sizeof greeting};
	struct sigaction act;
	struct mic_vop *f = argc == 2 ? mic_vop_open(argv[1]) : NULL;

	memset(&act, 0, sizeof act);
	act.sa_handler = on_signal; /* without SA_RESTART: a signal ends the wait */
	sigaction(SIGTERM, &act, NULL);
	sigaction(SIGHUP, &act, NULL);
	if (!f || mic_vop_add(f, &device) < 0) {
		perror(argc == 2 ? argv[1] : "usage: upper PATH");
		return 1;
	}
	while (!ending) {
		int news = mic_vop_wait(f, -1, -1);

		if (news < 0 && errno != EINTR)
			break; /* ENODEV: the card was stopped */
		while (news > 0 && mic_vop_pop(f, 0, &chain) == 1)
			answer(f, &chain, greeting);
		if (greet) {
			greet = 0;
			memcpy(greeting, "again: ", sizeof greeting);
			printf("acknowledged: %d\n", mic_vop_set_config(f, greeting));
			fflush(stdout);
		}
	}
	mic_vop_close(f);
	return 0;
}
