/* bind, listen, connect (SCIF-19..44). */
#include "t.h"

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

TEST(scif_27_28_38_backlog_full_refuses_at_once)
{
	alarm(20); /* less than the node's 30 s */
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

static int connected; /* what a blocking connect gave: -1 nothing yet, 0, or its errno */

static void *blocking_connect(void *arg)
{
	struct connector *c = arg;
	struct scif_portID to = { (uint16_t)c->node, (uint16_t)c->port };

	about_to_block();
	connected = scif_connect(c->fd, &to) < 0 ? errno : 0;
	return NULL;
}

TEST(scif_38_closing_a_listener_refuses_waiting_connects)
{
	alarm(20); /* less than the node's 30 s, after which they would be refused as well */
	int l = scif_open(), port = scif_bind(l, 0);
	struct connector c = { node_a(), port, scif_open() };
	pthread_t t;

	connected = -1;
	scif_listen(l, 3);
	pthread_create(&t, NULL, blocking_connect, &c);
	EQ(poll1(l, SCIF_POLLIN, 5000), SCIF_POLLIN);
	struct scif_portID to = { (uint16_t)node_a(), (uint16_t)port };
	FAILS(scif_connect(c.fd, &to), EISCONN); /* SCIF-36: another thread connects */
	OK(scif_close(l));
	pthread_join(t, NULL);
	EQ(connected, ECONNREFUSED);
}

TEST(scif_30_36_two_threads_connecting_one_endpoint)
{
	int l = scif_open(), port = scif_bind(l, 0);
	struct connector c = { node_a(), port, scif_open() };
	struct scif_portID to = { (uint16_t)node_a(), (uint16_t)port };
	pthread_t t;

	connected = -1;
	scif_listen(l, 3);
	pthread_create(&t, NULL, blocking_connect, &c);
	EQ(poll1(l, SCIF_POLLIN, 5000), SCIF_POLLIN);
	wait_until_blocked(); /* the request has come, and is not accepted */
	EQ(connected, -1);
	FAILS(scif_connect(c.fd, &to), EISCONN);
	int fd = accept_from(l, NULL);
	pthread_join(t, NULL);
	EQ(connected, 0);
	scif_close(fd);
}

TEST(scif_40_42_43_nonblocking_connect)
{
	int l = scif_open(), port = scif_bind(l, 0), fd = scif_open();
	struct scif_portID to = { (uint16_t)node_a(), (uint16_t)port }, from;

	scif_listen(l, 1);
	fcntl(fd, F_SETFL, O_NONBLOCK);
	FAILS(scif_connect(fd, &to), EINPROGRESS);
	FAILS(scif_connect(fd, &to), EINPROGRESS);
	EQ(poll1(fd, SCIF_POLLIN | SCIF_POLLOUT, 20), 0);
	EQ(native1(fd, POLLIN | POLLOUT, 20), 0);
	int srv = accept_from(l, &from);
	send_all(srv, "early", 5);
	EQ(native1(fd, POLLOUT, 5000), POLLOUT);
	EQ(poll1(fd, SCIF_POLLIN | SCIF_POLLOUT, 5000), SCIF_POLLOUT);
	EQ(scif_connect(fd, &to), from.port);
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
	EQ(native1(fd, POLLIN | POLLOUT, 20), 0);
	int srv = accept_from(l, NULL);
	EQ(native1(fd, POLLOUT, 5000), POLLOUT);
	EQ(poll1(fd, SCIF_POLLIN | SCIF_POLLOUT, 5000), SCIF_POLLOUT);
	CHECK(scif_connect(fd, &to) > 0);
	scif_close(srv);
}
