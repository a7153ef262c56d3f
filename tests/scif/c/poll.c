/* scif_poll, and poll, select and epoll on the descriptor (SCIF-69..77). */
#include "t.h"

TEST(scif_69_the_poll_and_drain_idiom_terminates)
{
	char buf[7];
	int e[2], n, total = 0;

	pair(e);
	send_all(e[0], "twenty bytes of text", 20);
	EQ(poll1(e[1], SCIF_POLLIN, 20000), SCIF_POLLIN);
	while ((n = scif_recv(e[1], buf, sizeof buf, 0)) > 0)
		total += n;
	EQ(n, 0);
	EQ(scif_recv(e[1], buf, 0, 0), 0);
	EQ(total, 20);
}

TEST(scif_70_unbound_and_bound_endpoints_report_pollerr)
{
	int fd = scif_open();

	EQ(poll1(fd, SCIF_POLLIN, -1), SCIF_POLLERR);
	CHECK(scif_bind(fd, 0) > 0);
	EQ(poll1(fd, SCIF_POLLIN | SCIF_POLLOUT, -1), SCIF_POLLERR);
}

static void *connect_thread(void *arg)
{
	struct connector *c = arg;
	return connector_main(c);
}

TEST(scif_71_listening_reports_pollin_while_a_request_waits)
{
	int l = listener_on(0, 4), port;
	pthread_t t;

	scif_close(l);
	l = scif_open();
	port = scif_bind(l, 0);
	scif_listen(l, 4);
	EQ(poll1(l, SCIF_POLLIN | SCIF_POLLOUT, 20), 0);
	EQ(native1(l, POLLIN | POLLOUT, 0), 0);
	struct connector c = { node_a(), port, -1 };
	pthread_create(&t, NULL, connect_thread, &c);
	EQ(poll1(l, SCIF_POLLIN | SCIF_POLLOUT, 5000), SCIF_POLLIN);
	EQ(native1(l, POLLIN | POLLOUT, 20000), POLLIN);
	int fd = accept_from(l, NULL);
	pthread_join(t, NULL);
	EQ(poll1(l, SCIF_POLLIN, 0), 0);
	EQ(native1(l, POLLIN, 0), 0);
	scif_close(fd);
}

TEST(scif_72_connected_masks)
{
	static char buf[5000];
	int e[2];

	pair(e);
	EQ(poll1(e[0], SCIF_POLLIN | SCIF_POLLOUT, 0), SCIF_POLLOUT);
	EQ(native1(e[0], POLLIN | POLLOUT, 0), POLLOUT);
	EQ(scif_send(e[1], buf, 5000, 0), 4095);
	EQ(poll1(e[0], SCIF_POLLIN | SCIF_POLLOUT, 0), SCIF_POLLIN | SCIF_POLLOUT);
	EQ(native1(e[0], POLLIN, 20000), POLLIN);
	EQ(poll1(e[1], SCIF_POLLIN | SCIF_POLLOUT, 0), 0);
	EVENTUALLY(native1(e[1], POLLIN | POLLOUT, 0) == 0 || scif_send(e[1], buf, 1, 0) < 0);
	EQ(scif_recv(e[0], buf, 1, 0), 1);
	EQ(poll1(e[1], SCIF_POLLIN | SCIF_POLLOUT, 0), SCIF_POLLOUT);
	EQ(native1(e[1], POLLOUT, 20000), POLLOUT);
}

static void *delayed(void *arg)
{
	usleep(30000);
	send_all(*(int *)arg, "x", 1);
	return NULL;
}

TEST(scif_74_poll_select_epoll_agree_and_wake)
{
	struct epoll_event ev = { .events = EPOLLIN }, got;
	int e[2], ef = epoll_create1(0);
	pthread_t t;
	char c;

	pair(e);
	CHECK(epoll_ctl(ef, EPOLL_CTL_ADD, e[0], &ev) == 0);
	for (int round = 0; round < 5; round++) {
		EQ(poll1(e[0], SCIF_POLLIN, 0), 0);
		EQ(native1(e[0], POLLIN, 0), 0);
		EQ(epoll_wait(ef, &got, 1, 0), 0);
		pthread_create(&t, NULL, delayed, &e[1]);
		if (round == 0) {
			EQ(epoll_wait(ef, &got, 1, 5000), 1);
		} else if (round == 1) {
			EQ(native1(e[0], POLLIN, 5000), POLLIN);
		} else if (round == 2) {
			fd_set r;

			FD_ZERO(&r);
			FD_SET(e[0], &r);
			struct timeval tv = { 5, 0 };
			EQ(select(e[0] + 1, &r, NULL, NULL, &tv), 1);
		} else {
			EQ(poll1(e[0], SCIF_POLLIN, 5000), SCIF_POLLIN);
		}
		EQ(poll1(e[0], SCIF_POLLIN, 0), SCIF_POLLIN);
		EQ(scif_recv(e[0], &c, 1, 0), 1);
		pthread_join(t, NULL);
	}
}

TEST(scif_74_edge_triggered_epoll_sees_every_arrival)
{
	struct epoll_event ev = { .events = EPOLLIN | EPOLLET }, got;
	int e[2], ef = epoll_create1(0);
	char buf[16];

	pair(e);
	CHECK(epoll_ctl(ef, EPOLL_CTL_ADD, e[0], &ev) == 0);
	for (int round = 0; round < 200; round++) {
		send_all(e[1], "hello", 5);
		EQ(epoll_wait(ef, &got, 1, 5000), 1);
		int n, total = 0;

		while ((n = scif_recv(e[0], buf, sizeof buf, 0)) > 0)
			total += n;
		EQ(total, 5);
	}
}

TEST(scif_75_closed_and_negative_descriptors_in_scif_poll)
{
	int fd = scif_open();
	struct scif_pollepd p[3] = { { fd, SCIF_POLLIN, 99 }, { -1, SCIF_POLLIN, 99 }, { 900, SCIF_POLLIN, 99 } };

	scif_close(fd);
	EQ(scif_poll(p, 3, -1), 2);
	EQ(p[0].revents, SCIF_POLLNVAL);
	EQ(p[1].revents, 0);
	EQ(p[2].revents, SCIF_POLLNVAL);
}

TEST(scif_76_timeouts)
{
	int e[2];

	pair(e);
	EQ(poll1(e[0], SCIF_POLLIN, 0), 0);
	uint64_t t0 = now_us();
	EQ(poll1(e[0], SCIF_POLLIN, 50), 0);
	CHECK(now_us() - t0 >= 49000); /* not before it has passed */
	pthread_t t;
	pthread_create(&t, NULL, delayed, &e[1]);
	EQ(poll1(e[0], SCIF_POLLIN, -1), SCIF_POLLIN);
	pthread_join(t, NULL);
}

TEST(scif_76_no_timeout_is_early)
{
	struct timespec before, after;
	int e[2];

	pair(e);
	for (int i = 0; i < 3000; i++) { /* begun anywhere in a millisecond */
		clock_gettime(CLOCK_MONOTONIC, &before);
		EQ(poll1(e[0], SCIF_POLLIN, 1), 0);
		clock_gettime(CLOCK_MONOTONIC, &after);
		CHECK((after.tv_sec - before.tv_sec) * 1000000000 + after.tv_nsec - before.tv_nsec >= 1000000);
	}
}

TEST(scif_77_a_mixture_of_descriptors)
{
	int e[2], pp[2], l = listener_on(0, 1);

	pair(e);
	CHECK(pipe(pp) == 0);
	struct scif_pollepd p[4] = { { l, SCIF_POLLIN, 0 }, { e[0], SCIF_POLLIN, 0 }, { pp[0], POLLIN, 0 },
				     { pp[1], POLLOUT, 0 } };
	EQ(scif_poll(p, 3, 10), 0);
	EQ(scif_poll(p, 4, 10), 1);
	EQ(p[3].revents, POLLOUT);
	CHECK(write(pp[1], "x", 1) == 1);
	EQ(scif_poll(p, 3, 20000), 1);
	EQ(p[2].revents, POLLIN);
	send_all(e[1], "y", 1);
	EQ(scif_poll(p, 3, 20000), 2);
	EQ(p[1].revents, SCIF_POLLIN);
	EQ(p[0].revents, 0);
}

static int reading_ep;
static void *read_ten(void *arg)
{
	char ten[10];

	about_to_block();
	recv_all(reading_ep, ten, 10);
	return arg;
}

TEST(scif_74_what_a_blocked_recv_leaves_shows_on_the_descriptor)
{
	char buf[100] = "";
	pthread_t t;
	int e[2];

	pair(e);
	reading_ep = e[0];
	pthread_create(&t, NULL, read_ten, NULL);
	wait_until_blocked();
	send_all(e[1], buf, 100);
	pthread_join(t, NULL);
	EQ(native1(e[0], POLLIN, 20000), POLLIN);
	EQ(scif_recv(e[0], buf, 100, 0), 90);
	EQ(native1(e[0], POLLIN, 0), 0);
}

TEST(scif_58_74_after_a_reader_was_killed_its_descriptor_tells_of_bytes)
{
	char buf[100] = "";
	int e[2], st;

	pair(e);
	for (int with_recv = 0; with_recv < 2; with_recv++) {
		pid_t pid = fork();

		if (pid == 0)
			_exit(scif_recv(e[0], buf, 10, SCIF_RECV_BLOCK));
		usleep(100000); /* it sleeps in recv, or will be killed before: both must be right */
		kill(pid, SIGKILL);
		EQ(waitpid(pid, &st, 0), pid);
		if (with_recv)
			EQ(scif_recv(e[0], buf, 10, 0), 0);
		send_all(e[1], buf, 100);
		EQ(native1(e[0], POLLIN, 20000), POLLIN);
		EQ(scif_recv(e[0], buf, 100, 0), 100);
	}
}
