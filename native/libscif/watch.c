/* Copies to and from the windows of a card that may be lost in the middle of them (SCIF-102, 3.7).
 *
 * When a card is lost, the kernel takes the pages of its windows away from every process, also from one
 * that is stopped inside a copy of ours. Such a copy meets SIGBUS when it goes on: the handler puts
 * private memory in the window's place and the copy ends on that; whoever made it then sees that the
 * window is lost, and the call fails. Nothing is left by a jump, so no copy pays for it.
 *
 * The handler is there from the first window of a card that is mapped for copies, and only knows those:
 * any other SIGBUS, also of a scif_mmap mapping, is the program's, and goes where it would have gone. A
 * program that sets a handler of its own later replaces ours. */
#include "memory.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>

/* Never freed, only used again: the handler walks the list without a lock. */
struct watch {
	uintptr_t base;
	size_t len; /* 0: nothing is watched */
	uint32_t used, lost;
	struct watch *next;
};

static struct watch *all;
static struct sigaction before;
static pthread_once_t installed = PTHREAD_ONCE_INIT;

/* --- the handler: async-signal-safe throughout ----------------------------------------------------- */

static struct watch *find(uintptr_t at)
{
	for (struct watch *w = mic_load_acquire(&all); w; w = w->next) {
		size_t len = mic_load_acquire(&w->len);

		if (at - mic_load_acquire(&w->base) < len && mic_load_acquire(&w->len) == len)
			return w;
	}
	return NULL;
}

static bool replace(struct watch *w)
{
	/* First the mark: whoever meets the private memory finds it. */
	mic_store_release(&w->lost, 1u);
	return mmap((void *)w->base, w->len, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != MAP_FAILED;
}

/* What would have happened without us. */
static void pass_on(int sig, siginfo_t *info, void *context)
{
	static const struct sigaction by_default = {.sa_handler = SIG_DFL};
	bool fault = info->si_code > 0; /* else somebody sent it */

	if (!(before.sa_flags & SA_SIGINFO) &&
	    (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN)) {
		if (!fault && before.sa_handler == SIG_IGN)
			return;
		sigaction(sig, &before, NULL); /* the access is repeated, and ends the program */
		if (!fault)
			raise(sig);
		return;
	}
	if (before.sa_flags & SA_RESETHAND)
		sigaction(sig, &by_default, NULL);
	if (before.sa_flags & SA_SIGINFO)
		before.sa_sigaction(sig, info, context);
	else
		before.sa_handler(sig);
}

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	int saved = errno;
	struct watch *w = info->si_code > 0 ? find((uintptr_t)info->si_addr) : NULL;

	if (!w || !replace(w))
		pass_on(sig, info, context);
	errno = saved;
}

static void install(void)
{
	struct sigaction sa;

	if (sigaction(SIGBUS, NULL, &before) < 0)
		return;
	/* A handler that was there runs as it would have run: same mask, same stack. */
	sa = before;
	if (!(sa.sa_flags & SA_SIGINFO) && (sa.sa_handler == SIG_DFL || sa.sa_handler == SIG_IGN))
		sa.sa_flags = SA_ONSTACK;
	sa.sa_flags = (sa.sa_flags & ~SA_RESETHAND) | SA_SIGINFO;
	sa.sa_sigaction = on_sigbus;
	sigaction(SIGBUS, &sa, NULL);
}

/* --- who copies ------------------------------------------------------------------------------------- */

struct watch *watch_add(const void *base, size_t len)
{
	struct watch *w = mic_load_acquire(&all);
	uint32_t no = 0;

	pthread_once(&installed, install); /* and nobody copies before it is there */
	for (; w; w = w->next, no = 0)
		if (mic_cas(&w->used, &no, 1u))
			break;
	if (!w) {
		w = calloc(1, sizeof *w);
		if (!w)
			return NULL;
		w->used = 1;
		w->next = mic_load_acquire(&all);
		while (!mic_cas(&all, &w->next, w))
			;
	}
	mic_store_release(&w->lost, 0u);
	mic_store_release(&w->base, (uintptr_t)base);
	mic_store_release(&w->len, len);
	return w;
}

void watch_remove(struct watch *w)
{
	if (!w)
		return;
	mic_store_release(&w->len, (size_t)0);
	mic_store_release(&w->used, 0u);
}

bool watch_lost(const struct watch *w)
{
	return w && mic_load_acquire(&w->lost);
}
