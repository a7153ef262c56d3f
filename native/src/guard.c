/* See guard.h. */
#define _GNU_SOURCE
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>

#include "guard.h"
#include "mic/barrier.h"

static __thread sigjmp_buf *guard;
static struct sigaction previous;
static unsigned users;
static pthread_mutex_t users_lock = PTHREAD_MUTEX_INITIALIZER;

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	(void)info;
	(void)context;
	if (guard)
		siglongjmp(*guard, 1);
	/* Not ours: whoever was there before gets it when the access is repeated. */
	sigaction(sig, &previous, NULL);
}

void mic_guard_get(void)
{
	/* SA_NODEFER: leaving by siglongjmp must not leave the signal blocked. */
	struct sigaction sa = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER};

	pthread_mutex_lock(&users_lock);
	if (users++ == 0)
		sigaction(SIGBUS, &sa, &previous);
	pthread_mutex_unlock(&users_lock);
}

void mic_guard_put(void)
{
	pthread_mutex_lock(&users_lock);
	if (--users == 0)
		sigaction(SIGBUS, &previous, NULL);
	pthread_mutex_unlock(&users_lock);
}

int mic_guarded(int (*fn)(void *), void *arg, int lost)
{
	volatile int gone = lost; /* not in a register that the jump restores */
	sigjmp_buf env;
	int rc;

	if (sigsetjmp(env, 0)) {
		guard = NULL;
		return gone;
	}
	guard = &env;
	mic_signal_fence();
	rc = fn(arg);
	mic_signal_fence();
	guard = NULL;
	return rc;
}
