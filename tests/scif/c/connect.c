/* Library, descriptors, bind, listen, connect, accept (SCIF-3..53, 125..128, 136). */
#include "t.h"

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
	int pp[2], file = open("/proc/self/exe", O_RDONLY), fd = scif_open(), nfd = 77;
	char c;

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

static void wait_reset(int ep)
{
	char c;

	FAILS(scif_recv(ep, &c, 1, SCIF_RECV_BLOCK), ECONNRESET);
}

TEST(scif_15_a_dup_is_the_same_endpoint)
{
	pid_t pid;
	int ep = with_peer(wait_reset, &pid), st;

	int d = dup(ep);
	OK(scif_close(ep));
	EQ(scif_send(d, "", 0, 0), 0);
	EQ(poll1(d, SCIF_POLLOUT, 0), SCIF_POLLOUT);
	usleep(20000);
	EQ(waitpid(pid, &st, WNOHANG), 0);
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
	int ep = with_peer(echo_bytes, &pid);
	char c = 'q';

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

		usleep(30000); /* the parent closes meanwhile */
		send_all(ep, &d, 1);
		recv_all(ep, &d, 1);
		_exit(d != 'r');
	}
	OK(scif_close(ep));
	reap(child);
	reap(pid);
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

TEST(scif_19_20_bind_errors)
{
	int fd = scif_open(), other = scif_open();

	EQ(scif_bind(fd, 5000), 5000);
	FAILS(scif_bind(fd, 5001), EINVAL);
	FAILS(scif_bind(other, 5000), EINVAL);
	EQ(scif_bind(other, 1024), 1024);
	OK(scif_close(fd));
	fd = scif_open();
	EQ(scif_bind(fd, 5000), 5000);
}

TEST(scif_22_the_same_port_on_another_node)
{
	int fd = scif_open();

	EQ(scif_bind(fd, 5002), 5002);
	pid_t pid = fork();
	if (pid == 0) {
		on_node((node_a() + 1) % 3);
		_exit(scif_bind(scif_open(), 5002) != 5002);
	}
	reap(pid);
}

TEST(scif_21_26_35_states_that_do_not_allow_bind_listen_connect)
{
	struct scif_portID to = { (uint16_t)node_a(), 5003 };
	int e[2], l = listener_on(5003, 1), fd = scif_open();

	FAILS(scif_listen(fd, 1), EINVAL);
	FAILS(scif_listen(l, 1), EISCONN);
	FAILS(scif_bind(l, 5004), EISCONN);
	FAILS(scif_connect(l, &to), EOPNOTSUPP);
	pair(e);
	FAILS(scif_listen(e[0], 1), EISCONN);
	FAILS(scif_bind(e[0], 5004), EISCONN);
	FAILS(scif_connect(e[0], &to), EISCONN);
	scif_close(e[1]);
	EQ(poll1(e[0], SCIF_POLLIN, 5000), SCIF_POLLHUP);
	FAILS(scif_listen(e[0], 1), EINVAL);
	FAILS(scif_bind(e[0], 5004), EISCONN);
	FAILS(scif_connect(e[0], &to), EINVAL);
	to.port = 0;
	FAILS(scif_connect(fd, &to), EINVAL); /* SCIF-34 */
	FAILS(scif_connect(fd, NULL), EINVAL); /* SCIF-31 */
}

TEST(scif_31_32_34_bad_destinations)
{
	struct scif_portID none = { 9, 5 }, far = { 60000, 5 }, zero = { 0, 0 };
	int fd = scif_open(), l = listener_on(0, 1);

	FAILS(scif_connect(fd, NULL), EINVAL);
	FAILS(scif_connect(fd, &none), ENODEV);
	FAILS(scif_connect(fd, &far), ENODEV);
	FAILS(scif_connect(l, &none), ENODEV);
	FAILS(scif_connect(fd, &zero), EINVAL);
}

static void report_port(int ep)
{
	struct { uint16_t node, port; } seen;

	recv_all(ep, &seen, sizeof seen);
	EQ(seen.node, node_b());
	meet(ep);
}

TEST(scif_29_39_connect_returns_the_port_that_accept_reports)
{
	struct scif_portID from = { 99, 99 };
	int l = scif_open(), port = scif_bind(l, 0), pp[2], got;

	CHECK(pipe(pp) == 0);
	scif_listen(l, 1);
	pid_t pid = fork();
	if (pid == 0) {
		struct scif_portID to = { (uint16_t)node_a(), (uint16_t)port };
		on_node(node_b());
		int ep = scif_open(), mine = scif_connect(ep, &to);
		CHECK(write(pp[1], &mine, sizeof mine) == sizeof mine);
		report_port(ep);
		_exit(0);
	}
	int ep = accept_from(l, &from);
	CHECK(read(pp[0], &got, sizeof got) == sizeof got);
	EQ(from.port, got);
	EQ(from.node, node_b());
	send_all(ep, &from, sizeof from);
	meet(ep);
	reap(pid);
}

TEST(scif_33_refused_connect_keeps_the_port)
{
	struct scif_portID to = { (uint16_t)node_b(), 5005 };
	int fd = scif_open();

	FAILS(scif_connect(fd, &to), ECONNREFUSED);
	FAILS(scif_bind(fd, 0), EINVAL);
	FAILS(scif_connect(fd, &to), ECONNREFUSED);
	EQ(poll1(fd, SCIF_POLLIN, 0), SCIF_POLLERR);
}

TEST(scif_27_28_backlog_full_refuses_at_once)
{
	int l = scif_open(), port = scif_bind(l, 0), fd = scif_open();
	struct scif_portID to = { (uint16_t)node_a(), (uint16_t)port };

	EQ(scif_listen(l, 0), 0);
	FAILS(scif_connect(fd, &to), ECONNREFUSED);
	OK(scif_close(l));
	l = scif_open();
	EQ(scif_bind(l, (uint16_t)port), port);
	scif_listen(l, 2);
	int q[2];
	for (int i = 0; i < 2; i++) {
		q[i] = scif_open();
		fcntl(q[i], F_SETFL, O_NONBLOCK);
		FAILS(scif_connect(q[i], &to), EINPROGRESS);
		EQ(poll1(q[i], SCIF_POLLOUT, 20), 0);
	}
	FAILS(scif_connect(fd, &to), ECONNREFUSED);
	OK(scif_close(l)); /* SCIF-38 */
	for (int i = 0; i < 2; i++) {
		EQ(poll1(q[i], SCIF_POLLOUT, 5000), SCIF_POLLOUT);
		FAILS(scif_connect(q[i], &to), ECONNREFUSED);
	}
}

static void *blocking_connect(void *arg)
{
	struct connector *c = arg;
	struct scif_portID to = { (uint16_t)c->node, (uint16_t)c->port };

	c->node = scif_connect(c->fd, &to) < 0 ? errno : 0;
	return NULL;
}

TEST(scif_38_closing_a_listener_refuses_waiting_connects)
{
	int l = scif_open(), port = scif_bind(l, 0);
	struct connector c = { node_a(), port, scif_open() };
	pthread_t t;

	scif_listen(l, 3);
	pthread_create(&t, NULL, blocking_connect, &c);
	EQ(poll1(l, SCIF_POLLIN, 5000), SCIF_POLLIN);
	struct scif_portID to = { (uint16_t)node_a(), (uint16_t)port };
	FAILS(scif_connect(c.fd, &to), EISCONN); /* SCIF-36: another thread connects */
	OK(scif_close(l));
	pthread_join(t, NULL);
	EQ(c.node, ECONNREFUSED);
}

TEST(scif_36_two_threads_connecting_one_endpoint)
{
	int l = scif_open(), port = scif_bind(l, 0);
	struct connector c = { node_a(), port, scif_open() };
	struct scif_portID to = { (uint16_t)node_a(), (uint16_t)port };
	pthread_t t;

	scif_listen(l, 3);
	pthread_create(&t, NULL, blocking_connect, &c);
	EQ(poll1(l, SCIF_POLLIN, 5000), SCIF_POLLIN);
	FAILS(scif_connect(c.fd, &to), EISCONN);
	int fd = accept_from(l, NULL);
	pthread_join(t, NULL);
	EQ(c.node, 0);
	scif_close(fd);
}

TEST(scif_40_42_43_nonblocking_connect)
{
	int l = scif_open(), port = scif_bind(l, 0), fd = scif_open();
	struct scif_portID to = { (uint16_t)node_a(), (uint16_t)port };

	scif_listen(l, 1);
	fcntl(fd, F_SETFL, O_NONBLOCK);
	FAILS(scif_connect(fd, &to), EINPROGRESS);
	FAILS(scif_connect(fd, &to), EINPROGRESS);
	EQ(poll1(fd, SCIF_POLLIN | SCIF_POLLOUT, 20), 0);
	EQ(native1(fd, POLLIN | POLLOUT, 20), 0);
	int srv = accept_from(l, NULL);
	send_all(srv, "early", 5);
	EQ(native1(fd, POLLOUT, 5000), POLLOUT);
	EQ(poll1(fd, SCIF_POLLIN | SCIF_POLLOUT, 5000), SCIF_POLLOUT);
	int mine = scif_connect(fd, &to);
	CHECK(mine >= 1089);
	EQ(poll1(fd, SCIF_POLLIN | SCIF_POLLOUT, 0), SCIF_POLLIN | SCIF_POLLOUT);
	FAILS(scif_connect(fd, &to), EISCONN);
	char buf[5];
	EQ(scif_recv(fd, buf, 5, 0), 5);
}

TEST(scif_41_44_nonblocking_connect_refused_and_tried_again)
{
	struct scif_portID to = { (uint16_t)node_a(), 5010 };
	int fd = scif_open();

	fcntl(fd, F_SETFL, O_NONBLOCK);
	FAILS(scif_connect(fd, &to), EINPROGRESS);
	EQ(poll1(fd, SCIF_POLLIN | SCIF_POLLOUT, 5000), SCIF_POLLOUT);
	FAILS(scif_connect(fd, &to), ECONNREFUSED);
	EQ(poll1(fd, SCIF_POLLIN | SCIF_POLLOUT, 5000), SCIF_POLLERR);
	int l = listener_on(5010, 1);
	FAILS(scif_connect(fd, &to), EINPROGRESS);
	EQ(poll1(fd, SCIF_POLLIN | SCIF_POLLOUT, 20), 0);
	int srv = accept_from(l, NULL);
	EQ(poll1(fd, SCIF_POLLIN | SCIF_POLLOUT, 5000), SCIF_POLLOUT);
	CHECK(scif_connect(fd, &to) > 0);
	scif_close(srv);
}

TEST(scif_45_47_51_accept_errors_leave_the_results_alone)
{
	struct scif_portID from = { 7, 8 };
	int l = listener_on(0, 1), fd = scif_open(), nfd = 55;

	fcntl(l, F_SETFL, O_NONBLOCK);
	FAILS(scif_accept(l, &from, &nfd, 0), EAGAIN);
	fcntl(l, F_SETFL, 0);
	FAILS(scif_accept(l, &from, &nfd, 0), EAGAIN);
	FAILS(scif_accept(l, &from, &nfd, 2), EINVAL);
	FAILS(scif_accept(l, NULL, &nfd, 0), EINVAL);
	FAILS(scif_accept(l, &from, NULL, 0), EINVAL);
	FAILS(scif_accept(fd, &from, &nfd, 1), EINVAL);
	EQ(from.node, 7);
	EQ(from.port, 8);
	EQ(nfd, 55);
}

static int acc_errno;
static void *blocked_accept(void *arg)
{
	struct scif_portID from;
	int nfd;

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
	usleep(30000);
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
	usleep(30000);
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
	usleep(30000);
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
	usleep(30000);
	pthread_kill(acc_thread, SIGUSR1);
	if (flags & SA_RESTART) {
		usleep(30000);
		EQ(acc_errno, -1);
		connect_to(node_a(), port);
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

TEST(scif_24_connect_without_a_free_port_gives_enospc)
{
	struct rlimit rl = { 70000, 70000 };
	struct scif_portID to = { (uint16_t)node_a(), 5 };

	if (setrlimit(RLIMIT_NOFILE, &rl) < 0)
		return; /* the kernel client test covers it */
	FAILS(scif_connect(scif_open(), &to), ECONNREFUSED);
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

static void sleepy(int ep)
{
	static char buf[10000];

	meet(ep);
	usleep(100000);
	recv_all(ep, buf, sizeof buf);
	meet(ep);
}

TEST(scif_58_60_ten_thousand_bytes_stall_until_they_are_read)
{
	static char buf[10000];
	pid_t pid;
	int ep = with_peer(sleepy, &pid);

	meet(ep);
	uint64_t t0 = now_us();
	EQ(scif_send(ep, buf, 4095, SCIF_SEND_BLOCK), 4095); /* fits without a reader */
	CHECK(now_us() - t0 < 80000);
	EQ(scif_send(ep, buf, 5905, SCIF_SEND_BLOCK), 5905);
	CHECK(now_us() - t0 > 80000);
	meet(ep);
	reap(pid);
}
