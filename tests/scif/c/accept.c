/* accept (SCIF-30, 45..53). */
#include "t.h"

TEST(scif_45_47_51_accept_errors_leave_the_results_alone)
{
	struct scif_portID from = { 7, 8 };
	int l = listener_on(0, 1), fd = scif_open(), nfd = 55, e[2];

	fcntl(l, F_SETFL, O_NONBLOCK);
	FAILS(scif_accept(l, &from, &nfd, 0), EAGAIN);
	fcntl(l, F_SETFL, 0);
	FAILS(scif_accept(l, &from, &nfd, 0), EAGAIN);
	for (int bit = 2; bit; bit <<= 1) { /* alone, and with SYNC */
		FAILS(scif_accept(l, &from, &nfd, bit), EINVAL);
		FAILS(scif_accept(l, &from, &nfd, bit | SCIF_ACCEPT_SYNC), EINVAL);
	}
	FAILS(scif_accept(l, NULL, &nfd, 0), EINVAL);
	FAILS(scif_accept(l, &from, NULL, 0), EINVAL);
	FAILS(scif_accept(fd, &from, &nfd, 1), EINVAL);
	CHECK(scif_bind(fd, 0) > 0);
	FAILS(scif_accept(fd, &from, &nfd, 1), EINVAL);
	pair(e);
	FAILS(scif_accept(e[0], &from, &nfd, 1), EINVAL);
	FAILS(scif_accept(e[1], &from, &nfd, 0), EINVAL);
	EQ(from.node, 7);
	EQ(from.port, 8);
	EQ(nfd, 55);
}

static int acc_errno;

static void *blocked_accept(void *arg)
{
	struct scif_portID from;
	int nfd;

	about_to_block();
	acc_errno = scif_accept(*(int *)arg, &from, &nfd, SCIF_ACCEPT_SYNC) < 0 ? errno : 0;
	return NULL;
}

TEST(scif_46_30_blocking_accept_ignores_o_nonblock)
{
	int l = scif_open(), port = scif_bind(l, 0);
	pthread_t t;

	scif_listen(l, 1);
	fcntl(l, F_SETFL, O_NONBLOCK);
	acc_errno = -1;
	pthread_create(&t, NULL, blocked_accept, &l);
	wait_until_blocked();
	EQ(acc_errno, -1);
	connect_to(node_a(), port);
	pthread_join(t, NULL);
	EQ(acc_errno, 0);
}

TEST(scif_48_closing_the_listener_ends_a_blocked_accept)
{
	int l = listener_on(0, 1), d = dup(l);
	pthread_t t;

	pthread_create(&t, NULL, blocked_accept, &l);
	wait_until_blocked();
	OK(scif_close(l));
	pthread_join(t, NULL);
	EQ(acc_errno, EINTR);
	struct scif_portID from;
	int nfd;
	FAILS(scif_accept(d, &from, &nfd, 0), EINVAL); /* close-listening */
	FAILS(scif_listen(d, 1), EINVAL);
	from = (struct scif_portID){ 0, 5 };
	FAILS(scif_connect(d, &from), EOPNOTSUPP);
	EQ(poll1(d, SCIF_POLLIN, 0), SCIF_POLLERR);
}

TEST(scif_49_a_forked_childs_close_does_not_end_accept)
{
	int l = scif_open(), port = scif_bind(l, 0);
	pthread_t t;

	scif_listen(l, 1);
	acc_errno = -1;
	pthread_create(&t, NULL, blocked_accept, &l);
	wait_until_blocked();
	pid_t pid = fork();
	if (pid == 0)
		_exit(scif_close(l) != 0);
	reap(pid);
	usleep(20000);
	EQ(acc_errno, -1);
	connect_to(node_a(), port);
	pthread_join(t, NULL);
	EQ(acc_errno, 0);
}

static void nothing(int s) { (void)s; }

static pthread_t acc_thread;

static void interrupt_accept(int flags, int expected, int port)
{
	struct sigaction sa = { .sa_handler = nothing, .sa_flags = flags };

	sigaction(SIGUSR1, &sa, NULL);
	wait_until_blocked();
	pthread_kill(acc_thread, SIGUSR1);
	usleep(30000);
	if (flags & SA_RESTART) {
		EQ(acc_errno, -1);
		connect_to(node_a(), port);
	} else { /* a signal before the call has begun to wait ends nothing */
		EVENTUALLY(__atomic_load_n(&acc_errno, __ATOMIC_ACQUIRE) != -1 || pthread_kill(acc_thread, SIGUSR1));
	}
	pthread_join(acc_thread, NULL);
	EQ(acc_errno, expected);
}

TEST(scif_50_signals_and_a_blocked_accept)
{
	int l = scif_open(), port = scif_bind(l, 0);

	scif_listen(l, 1);
	acc_errno = -1;
	pthread_create(&acc_thread, NULL, blocked_accept, &l);
	interrupt_accept(0, EINTR, port);
	acc_errno = -1;
	pthread_create(&acc_thread, NULL, blocked_accept, &l);
	interrupt_accept(SA_RESTART, 0, port);
}

static void *connect_send_close(void *arg)
{
	struct connector *c = arg;
	int fd = connect_to(c->node, c->port);

	send_all(fd, "bye", 3);
	CHECK(scif_close(fd) == 0);
	return NULL;
}

TEST(scif_52_connect_send_close_before_accept_is_noticed)
{
	int l = scif_open(), port = scif_bind(l, 0);
	struct connector c = { node_a(), port, -1 };
	char buf[4];
	pthread_t t;

	scif_listen(l, 1);
	pthread_create(&t, NULL, connect_send_close, &c);
	int fd = accept_from(l, NULL);
	pthread_join(t, NULL);
	EQ(scif_recv(fd, buf, 4, SCIF_RECV_BLOCK), 3);
	FAILS(scif_recv(fd, buf, 4, SCIF_RECV_BLOCK), ECONNRESET);
}

TEST(scif_53_requests_are_accepted_in_order)
{
	int l = scif_open(), port = scif_bind(l, 0), fd[4];
	struct scif_portID to = { (uint16_t)node_a(), (uint16_t)port }, from;

	scif_listen(l, 4);
	for (int i = 0; i < 4; i++) {
		fd[i] = scif_open();
		EQ(scif_bind(fd[i], (uint16_t)(6000 + i)), 6000 + i);
		fcntl(fd[i], F_SETFL, O_NONBLOCK);
		FAILS(scif_connect(fd[i], &to), EINPROGRESS);
	}
	for (int i = 0; i < 4; i++) {
		accept_from(l, &from);
		EQ(from.port, 6000 + i);
	}
}

static int shared_listener;
static void *accept_for_ever(void *arg)
{
	struct scif_portID from;
	int fd;

	about_to_block();
	scif_accept(shared_listener, &from, &fd, SCIF_ACCEPT_SYNC);
	return arg;
}

TEST(scif_17_48_an_accept_ends_with_its_process_although_a_child_of_it_lives)
{
	int p[2], l = scif_open(), port = scif_bind(l, 0), fd, st;
	struct scif_portID from, to = { (uint16_t)node_a(), (uint16_t)port };
	char c;

	CHECK(pipe(p) == 0 && scif_listen(l, 4) == 0);
	pid_t dying = fork();
	if (dying == 0) {
		pid_t me = getpid();
		pthread_t t;

		shared_listener = l;
		pthread_create(&t, NULL, accept_for_ever, NULL);
		wait_until_blocked();
		if (fork() == 0) {
			alarm(30);
			while (getppid() == me)
				usleep(1000);
			CHECK(scif_accept(l, &from, &fd, SCIF_ACCEPT_SYNC) == 0);
			CHECK(write(p[1], "a", 1) == 1);
			_exit(0);
		}
		CHECK(write(p[1], "f", 1) == 1);
		pause();
	}
	EQ(read(p[0], &c, 1), 1);
	kill(dying, SIGKILL);
	EQ(waitpid(dying, &st, 0), dying);
	close(p[1]);
	OK(scif_close(l));
	fd = scif_open();
	CHECK(scif_connect(fd, &to) >= 0);
	EQ(read(p[0], &c, 1), 1); /* the child's accept has it, not the dead one's */
	EQ(c, 'a');
}
