/* Adds, reconfigures and removes a device of type 42, argv[2] times; a file of its own each time. */
#include <errno.h>
#include <mic_vop.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int once(const char *path, char *config)
{
	struct mic_vop_device device = {42, 2, 8, 0, config, 4};
	struct mic_vop *f = mic_vop_open(path);
	int rc = -1, news = 1;

	errno = 0;
	if (!f || mic_vop_add(f, &device) < 0)
		goto out;
	while (news > 0 && !mic_vop_driver_ok(f))
		news = mic_vop_wait(f, 20000, -1);
	if (news <= 0) {
		fprintf(stderr, "the card's driver does not come up\n");
		goto out;
	}
	config[0]++;
	rc = mic_vop_set_config(f, config) - 1;
	if (rc == -1)
		fprintf(stderr, "the card does not acknowledge the configuration\n");
out:
	if (rc < 0)
		perror("churn");
	mic_vop_close(f);
	return rc;
}

int main(int argc, char **argv)
{
	char config[4] = "abc";

	for (int i = 0; argc == 3 && i < atoi(argv[2]); i++)
		if (once(argv[1], config) < 0)
			return 1;
	return argc != 3;
}
