/* The library and its descriptors: open, dup, fork, exec, kill, close; node ids (SCIF-3..17, 125..128, 133, 136). */
#include "t.h"

#include <malloc.h>

TEST(scif_7_8_open_returns_the_lowest_descriptor_with_cloexec)
{
	int low = dup(0);

	close(low);
	errno = 0;
	int fd = scif_open();
	EQ(errno, 0);
	EQ(fd, low);
	CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
	OK(scif_bind(fd, 0));
	OK(scif_listen(fd, 1));
	OK(scif_close(fd));
	EQ(scif_open(), low);
}

static void hello(int ep) { meet(ep); }

TEST(scif_9_accepted_descriptor_has_no_cloexec)
{
	pid_t pid;
	int ep = with_peer(hello, &pid);

	EQ(fcntl(ep, F_GETFD) & FD_CLOEXEC, 0);
	meet(ep);
	reap(pid);
}

TEST(scif_10_get_fd_returns_its_argument)
{
	int fd = scif_open();

	EQ(scif_get_fd(fd), fd);
	EQ(scif_get_fd(-5), -5);
	EQ(scif_get_fd(12345), 12345);
}

TEST(scif_11_12_calls_on_foreign_and_closed_descriptors)
{
	struct scif_portID to = { 0, 5 }, from;
	int pp[2], file = open("/proc/self/exe", O_RDONLY), fd = scif_open(), nfd = 77, mark;
	char c, *p = pages(1);

	CHECK(pipe(pp) == 0);
	CHECK(scif_close(fd) == 0);
	int bad[] = { fd, pp[0], file, -1 }, code[] = { EBADF, ENOTTY, ENOTTY, EBADF };
	for (int i = 0; i < 4; i++) {
		int d = bad[i], e = code[i];

		FAILS(scif_bind(d, 5000), e);
		FAILS(scif_listen(d, 1), e);
		FAILS(scif_connect(d, &to), e);
		if (d != fd) /* the lowest number is the new descriptor's, as in the real library */
			FAILS(scif_accept(d, &from, &nfd, 0), e);
		FAILS(scif_send(d, &c, 1, 0), e);
		FAILS(scif_recv(d, &c, 1, 0), e);
		FAILS(scif_register(d, p, PG, 0, SCIF_PROT_READ, 0), e);
		FAILS(scif_unregister(d, 0, PG), e);
		FAILS(scif_readfrom(d, 0, PG, 0, 0), e);
		FAILS(scif_writeto(d, 0, PG, 0, 0), e);
		FAILS(scif_vreadfrom(d, p, PG, 0, 0), e);
		FAILS(scif_vwriteto(d, p, PG, 0, 0), e);
		FAILS(scif_fence_mark(d, SCIF_FENCE_INIT_SELF, &mark), e);
		FAILS(scif_fence_wait(d, 1), e);
		FAILS(scif_fence_signal(d, 0, 1, 0, 1, SCIF_FENCE_INIT_SELF | SCIF_SIGNAL_LOCAL), e);
	}
	EQ(nfd, 77);
	FAILS(scif_close(fd), EBADF);
	EQ(scif_close(pp[0]), 0);
	fd = scif_open();
	close(fd); /* plain close */
	FAILS(scif_bind(fd, 0), EBADF);
	FAILS(scif_send(fd, &c, 1, 0), EBADF);
	int e[2];
	pair(e);
	meet_both(e);
	close(e[0]);
	FAILS(scif_send(e[0], &c, 1, 0), EBADF);
	CHECK(dup2(open("/dev/null", O_RDWR), e[0]) == e[0]);
	FAILS(scif_recv(e[0], &c, 1, 0), ENOTTY);
}

TEST(scif_13_descriptor_exhaustion_gives_emfile)
{
	struct scif_portID from;
	struct rlimit rl;
	uint16_t nodes[4], self;
	int l = listener_on(0, 1), nfd;

	getrlimit(RLIMIT_NOFILE, &rl);
	rl.rlim_cur = 64;
	setrlimit(RLIMIT_NOFILE, &rl);
	while (dup(0) >= 0)
		;
	FAILS(scif_open(), EMFILE);
	FAILS(scif_accept(l, &from, &nfd, 0), EMFILE);
	FAILS(scif_get_nodeIDs(nodes, 4, &self), EMFILE);
}

TEST(scif_13_a_connection_without_a_descriptor_left_gives_emfile)
{
	struct rlimit rl;
	int e[2], d;
	char c = 'x';

	pair(e);
	getrlimit(RLIMIT_NOFILE, &rl);
	rl.rlim_cur = 64;
	setrlimit(RLIMIT_NOFILE, &rl);
	while ((d = dup(0)) >= 0)
		;
	FAILS(scif_send(e[0], &c, 1, 0), EMFILE); /* the first look at the connection's memory */
	close(63);
	FAILS(scif_send(e[0], &c, 1, 0), EMFILE); /* there are two */
	close(62);
	EQ(scif_send(e[0], &c, 1, 0), 1);
}

static void byte_then_reset(int ep)
{
	char c;

	recv_all(ep, &c, 1);
	FAILS(scif_recv(ep, &c, 1, SCIF_RECV_BLOCK), ECONNRESET);
}

TEST(scif_15_a_dup_is_the_same_endpoint)
{
	pid_t pid;
	int ep = with_peer(byte_then_reset, &pid), d = dup(ep);

	OK(scif_close(ep));
	EQ(scif_send(d, "", 0, 0), 0);
	EQ(poll1(d, SCIF_POLLOUT, 0), SCIF_POLLOUT);
	send_all(d, "d", 1); /* the peer is still connected */
	OK(scif_close(d));
	reap(pid);
}

static void echo_bytes(int ep)
{
	char c;

	while (scif_recv(ep, &c, 1, SCIF_RECV_BLOCK) == 1)
		send_all(ep, &c, 1);
}

TEST(scif_16_closing_in_a_forked_child_does_not_disconnect_the_parent)
{
	pid_t pid, child;
	int ep = with_peer(echo_bytes, &pid), pp[2];
	char c = 'q';

	CHECK(pipe(pp) == 0);

	child = fork();
	if (child == 0) {
		send_all(ep, &c, 1); /* the child may use it too */
		recv_all(ep, &c, 1);
		_exit(scif_close(ep) != 0);
	}
	reap(child);
	send_all(ep, &c, 1);
	recv_all(ep, &c, 1);
	child = fork();
	if (child == 0) {
		char d = 'r';

		close(pp[1]);
		CHECK(read(pp[0], &c, 1) == 0); /* the parent has closed */
		send_all(ep, &d, 1);
		recv_all(ep, &d, 1);
		_exit(d != 'r');
	}
	OK(scif_close(ep));
	close(pp[1]);
	reap(child);
	reap(pid);
}

TEST(scif_15_a_plain_close_loses_no_memory) /* leak checkers run this one, too */
{
	struct mallinfo2 before = {0};

	for (int i = 0; i < 1000; i++) {
		int fd = scif_open();

		CHECK(fd >= 0);
		CHECK(scif_bind(fd, 0) > 0);
		close(fd);
		if (i == 10)
			before = mallinfo2();
	}
	CHECK(mallinfo2().uordblks <= before.uordblks + 1024);
}

TEST(scif_17_kill_disconnects_and_frees_the_ports)
{
	int pp[2], port;
	char c;

	CHECK(pipe(pp) == 0);
	pid_t pid = fork();
	if (pid == 0) {
		int l = scif_open();
		port = scif_bind(l, 0);
		scif_listen(l, 1);
		CHECK(write(pp[1], &port, sizeof port) == sizeof port);
		accept_from(l, NULL);
		pause();
	}
	CHECK(read(pp[0], &port, sizeof port) == sizeof port);
	int ep = connect_to(node_a(), port);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	FAILS(scif_recv(ep, &c, 1, SCIF_RECV_BLOCK), ECONNRESET);
	scif_close(ep);
	int l = scif_open();
	EVENTUALLY(scif_bind(l, (uint16_t)port) == port);
}

TEST(scif_8_16_a_fork_closes_none_of_the_programs_descriptors)
{
	int fd = scif_open(), null = open("/dev/null", O_RDWR), ours = 0;

	OK(scif_bind(fd, 0)); /* a request: the library has a descriptor of its own now */
	for (int n = 512; n < 1024; n++)
		if (fcntl(n, F_GETFD) >= 0) {
			EQ(dup2(null, n), n); /* as after closefrom(3) */
			ours = n;
		}
	CHECK(ours);
	pid_t pid = fork();
	if (pid == 0)
		_exit(fcntl(ours, F_GETFD) < 0);
	reap(pid);
	OK(scif_listen(fd, 1)); /* and the library helps itself to another one */
}

static volatile int done_copying;
static int window_list_ep;

/* Copies that always find the list of windows changed: its lock is held most of the time. */
static void *change_windows(void *arg)
{
	char *p = pages(8), byte;

	while (!done_copying) {
		for (int i = 0; i < 8; i++)
			CHECK(scif_register(window_list_ep, p + i * PG, PG, i * PG, SCIF_PROT_READ, SCIF_MAP_FIXED) >= 0);
		CHECK(scif_vreadfrom(window_list_ep, &byte, 1, 0, 0) == 0);
		EQ(scif_unregister(window_list_ep, 0, 8 * PG), 0);
	}
	return arg;
}

TEST(scif_16_a_child_of_a_fork_during_copies_can_copy)
{
	char *p = pages(1), byte;
	pthread_t t;
	int e[2];

	pair(e);
	window_list_ep = e[0];
	EQ(scif_register(e[1], p, PG, 0, SCIF_PROT_READ, SCIF_MAP_FIXED), 0);
	pthread_create(&t, NULL, change_windows, NULL);
	for (int i = 0; i < 400; i++) {
		pid_t pid = fork();

		if (pid == 0) {
			alarm(10);
			_exit(scif_vreadfrom(e[0], &byte, 1, 0, 0) != 0);
		}
		reap(pid);
	}
	done_copying = 1;
	pthread_join(t, NULL);
}

TEST(scif_133_concurrent_close)
{
	for (int i = 0; i < 20; i++) {
		int e[2];

		pair(e);
		pid_t pid = fork();
		if (pid == 0) {
			scif_close(e[0]);
			_exit(0);
		}
		OK(scif_close(e[0]));
		OK(scif_close(e[1]));
		reap(pid);
	}
}

TEST(scif_14_read_and_write_are_not_for_endpoints)
{
	/* docs/deviations.md: the descriptor is a socket; read finds nothing and waits, write is ignored
	 * by the node. What counts: the connection is not harmed. */
	int e[2];
	char c = 'w';

	pair(e);
	fcntl(e[0], F_SETFL, O_NONBLOCK);
	FAILS(read(e[0], &c, 1), EAGAIN);
	CHECK(write(e[0], &c, 1) == 1);
	fcntl(e[0], F_SETFL, 0);
	meet_both(e);
}

TEST(scif_7_16_errno_stays_zero_and_fork_before_open)
{
	int e[2], mark;
	char buf[8], *p = pages(2);

	errno = 0;
	pid_t pid = fork(); /* before anything was opened */
	if (pid == 0) {
		int fd = scif_open();

		CHECK(errno == 0 && scif_bind(fd, 0) > 0 && scif_listen(fd, 1) == 0 && scif_close(fd) == 0);
		_exit(errno);
	}
	reap(pid);
	pair(e);
	errno = 0;
	send_all(e[0], "12345678", 8);
	recv_all(e[1], buf, 8);
	off_t off = scif_register(e[0], p, 2 * PG, 0, 3, 0);
	CHECK(off > 0);
	CHECK(scif_vwriteto(e[1], buf, 8, off, 0) == 0);
	CHECK(scif_fence_mark(e[1], 1, &mark) == 0 && scif_fence_wait(e[1], mark) == 0);
	char *m = scif_mmap(NULL, PG, 3, 0, e[1], off);
	CHECK(m != SCIF_MMAP_FAILED && scif_munmap(m, PG) == 0);
	CHECK(scif_unregister(e[0], off, 2 * PG) == 0);
	EQ(poll1(e[0], SCIF_POLLOUT, 0), SCIF_POLLOUT);
	CHECK(scif_close(e[0]) == 0 && scif_close(e[1]) == 0);
	EQ(errno, 0);
}

TEST(scif_125_126_127_128_node_ids)
{
	uint16_t ids[8] = { 99, 99, 99, 99 }, self = 99;

	EQ(scif_get_nodeIDs(ids, 8, &self), 3);
	EQ(self, node_a());
	EQ(ids[0], 0);
	EQ(ids[1], 1);
	EQ(ids[2], 2);
	EQ(ids[3], 99);
	ids[1] = 77;
	EQ(scif_get_nodeIDs(ids, 1, &self), 3);
	EQ(ids[1], 77);
	EQ(scif_get_nodeIDs(NULL, 0, &self), 3);
	FAILS(scif_get_nodeIDs(ids, 8, NULL), EFAULT);
	FAILS(scif_get_nodeIDs(NULL, 8, &self), EFAULT);
	pid_t pid = fork();
	if (pid == 0) {
		on_node(2);
		EQ(scif_get_nodeIDs(ids, 8, &self), 3);
		EQ(self, 2);
		_exit(0);
	}
	reap(pid);
}

static void exec_child(int ep)
{
	char c, num[16], opened[16];

	snprintf(num, sizeof num, "%d", ep);
	snprintf(opened, sizeof opened, "%d", scif_open());
	recv_all(ep, &c, 1);
	EQ(c, 'e');
}

TEST(scif_136_exec_keeps_accepted_descriptors_usable)
{
	pid_t pid, child;
	int ep = with_peer(exec_child, &pid), opened = scif_open();
	char num[16], num2[16];

	snprintf(num, sizeof num, "%d", ep);
	snprintf(num2, sizeof num2, "%d", opened);
	setenv("EXEC_EP", num, 1);
	setenv("EXEC_OPENED", num2, 1);
	child = fork();
	if (child == 0) {
		execl("/proc/self/exe", "connect", "after_exec", (char *)NULL);
		_exit(1);
	}
	reap(child);
	reap(pid);
}

TEST(after_exec)
{
	if (!getenv("EXEC_EP"))
		return;
	FAILS(fcntl(atoi(getenv("EXEC_OPENED")), F_GETFD), EBADF);
	send_all(atoi(getenv("EXEC_EP")), "e", 1);
}
