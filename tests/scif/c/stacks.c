/* Registration and stacks: of a thread that registers its own, and of handlers that have another (SCIF-83, 86). */
#include "t.h"

#define RW (SCIF_PROT_READ | SCIF_PROT_WRITE)

static char other_stack[1 << 16];
static void ran_over(int sig) { _exit(sig == SIGSEGV ? 42 : 1); }
static int run_over(int n)
{
	volatile char frame[1000];

	frame[0] = (char)n;
	return n < 0 ? 0 : run_over(n + 1) + frame[0];
}

TEST(scif_86_a_handler_on_another_stack_stays_there_without_userfaultfd)
{
	struct sigaction sa = { .sa_handler = ran_over, .sa_flags = SA_ONSTACK };
	stack_t ss = { .ss_sp = other_stack, .ss_size = sizeof other_stack };
	struct rlimit small = { 1 << 20, 1 << 20 };
	int e[2], st;

	setenv("MICEMU_SCIF_NO_UFFD", "1", 1);
	pid_t pid = fork();
	if (pid == 0) {
		alarm(20);
		setrlimit(RLIMIT_STACK, &small);
		CHECK(sigaltstack(&ss, NULL) == 0);
		CHECK(sigaction(SIGSEGV, &sa, NULL) == 0);
		pair(e);
		CHECK(scif_register(e[0], pages(1), PG, 0, RW, 0) >= 0);
		_exit(run_over(0) & 1);
	}
	EQ(waitpid(pid, &st, 0), pid);
	EQ(st, 42 << 8);
}

static volatile int ticks;
static void tick(int sig) { ticks += sig == SIGALRM; }

static void *register_my_stack(void *arg)
{
	char *here = (char *)((uintptr_t)__builtin_frame_address(0) & ~(uintptr_t)(PG - 1));
	sigset_t alarms;
	off_t off;

	sigemptyset(&alarms);
	sigaddset(&alarms, SIGALRM);
	pthread_sigmask(SIG_UNBLOCK, &alarms, NULL);
	off = scif_register(*(int *)arg, here - 31 * PG, 32 * PG, 0, RW, 0);
	CHECK(off >= 0);
	pthread_sigmask(SIG_BLOCK, &alarms, NULL);
	EQ(scif_unregister(*(int *)arg, off, 32 * PG), 0);
	return NULL;
}

static void signals_while_a_stack_moves(void)
{
	const struct itimerval often = { { 0, 100 }, { 0, 100 } };
	sigset_t alarms;
	int e[2];

	pair(e);
	sigemptyset(&alarms);
	sigaddset(&alarms, SIGALRM);
	sigprocmask(SIG_BLOCK, &alarms, NULL);
	signal(SIGALRM, tick);
	CHECK(setitimer(ITIMER_REAL, &often, NULL) == 0);
	for (int i = 0; i < 200; i++) { /* each time a stack that was never moved */
		char *stack = pages(64);
		pthread_attr_t attr;
		pthread_t t;

		pthread_attr_init(&attr);
		pthread_attr_setstack(&attr, stack, 64 * PG);
		CHECK(pthread_create(&t, &attr, register_my_stack, &e[0]) == 0);
		pthread_join(t, NULL);
		pthread_attr_destroy(&attr);
		munmap(stack, 64 * PG);
	}
	CHECK(ticks);
}

TEST(scif_86_signals_while_a_thread_registers_its_stack) { signals_while_a_stack_moves(); }

TEST(scif_86_signals_while_a_thread_registers_its_stack_without_userfaultfd)
{
	setenv("MICEMU_SCIF_NO_UFFD", "1", 1);
	signals_while_a_stack_moves();
}
