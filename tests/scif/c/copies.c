/* Copies that DMA channels make while the program goes on (SCIF-104..114). */
#include "copies.h"

TEST(scif_104_118_large_asynchronous_copies_move_exactly_their_bytes)
{
	static const struct { size_t own, peer, len; int flags; } c[] = {
		{ 0, 0, 2 * MB, 0 },	       { 0, 64, 3 * MB, 0 },
		{ 4096, 128, 4 * MB, SCIF_RMA_ORDERED }, { 1, 1, 3 * MB, 0 },
		{ 7, 4096 + 7, 3 * MB + 501, 0 },	 { 63, 63, 3 * MB + 1, SCIF_RMA_ORDERED },
		{ 100, 36, 4 * MB + 17, SCIF_RMA_ORDERED }, { 5, 6, 3 * MB + 3, 0 },
		{ MB - 1, 3 * MB - 65, 2 * MB + 66, 0x100 | SCIF_RMA_ORDERED },
	};
	pid_t pid;
	int ep = with_peer(expose_only, &pid);
	char *l = expose(ep, OWN), *v = malloc(AREA), *z = calloc(1, AREA);

	meet(ep);
	for (unsigned i = 0; i < sizeof c / sizeof *c; i++) {
		OK(scif_vwriteto(ep, z, AREA, AT, SCIF_RMA_SYNC));
		fill(l + c[i].own, c[i].len, (int)i);
		OK(scif_writeto(ep, OWN + (off_t)c[i].own, c[i].len, AT + (off_t)c[i].peer, c[i].flags));
		fence(ep);
		OK(scif_vreadfrom(ep, v, AREA, AT, SCIF_RMA_SYNC));
		verify(v + c[i].peer, c[i].len, (int)i, "writeto");
		CHECK(!memcmp(v, z, c[i].peer));
		CHECK(!memcmp(v + c[i].peer + c[i].len, z, AREA - c[i].peer - c[i].len));

		memset(l, 0, AREA);
		OK(scif_readfrom(ep, OWN + (off_t)c[i].own, c[i].len, AT + (off_t)c[i].peer, c[i].flags));
		fence(ep);
		verify(l + c[i].own, c[i].len, (int)i, "readfrom");
		CHECK(!memcmp(l, z, c[i].own));
		CHECK(!memcmp(l + c[i].own + c[i].len, z, AREA - c[i].own - c[i].len));
	}
	OK(scif_close(ep));
	reap(pid);
}

TEST(scif_105_106_errors_of_large_copies_come_from_the_call)
{
	pid_t pid;
	int ep = with_peer(expose_only, &pid);
	char *ro = pages(2 * MB / PG);

	expose(ep, OWN);
	EQ(scif_register(ep, ro, 2 * MB, OWN + AREA, SCIF_PROT_READ, SCIF_MAP_FIXED), OWN + AREA);
	meet(ep);
	FAILS(scif_writeto(ep, OWN, AREA + 2 * MB + 64, AT, 0), ENXIO);
	FAILS(scif_writeto(ep, OWN + 64, AREA, AT + 64, 0), ENXIO);
	FAILS(scif_readfrom(ep, OWN, AREA + 64, AT, 0), EPERM);
	FAILS(scif_readfrom(ep, OWN + AREA, 2 * MB, AT, 0), EPERM);
	OK(scif_writeto(ep, OWN + AREA, 2 * MB, AT, 0));
	OK(scif_close(ep));
	reap(pid);
}

static void poll_last(int ep)
{
	char *p = expose(ep, AT);

	meet(ep);
	for (char round = 1; round < 20; round++) {
		while (__atomic_load_n(p + 4 * MB - 1, __ATOMIC_ACQUIRE) != round)
			sched_yield();
		for (int i = 0; i < 4 * MB - 64; i += 61)
			EQ(p[i], round);
		send_all(ep, &round, 1);
	}
	until_closed(ep);
}

TEST(scif_112_large_ordered_copies_write_the_last_line_last)
{
	pid_t pid;
	int ep = with_peer(poll_last, &pid);
	char *l = expose(ep, OWN), c;

	meet(ep);
	for (char round = 1; round < 20; round++) {
		memset(l, round, 4 * MB);
		OK(scif_writeto(ep, OWN, 4 * MB, AT, SCIF_RMA_ORDERED));
		recv_all(ep, &c, 1);
		fence(ep); /* the source may change again */
	}
	OK(scif_close(ep));
	reap(pid);
}

static void come_and_go(int ep)
{
	char c;

	for (;;) {
		char *p = pages(2 * MB / PG), *q;

		EQ(scif_register(ep, p, 2 * MB, AT, RW, SCIF_MAP_FIXED), AT);
		send_all(ep, "r", 1);
		recv_all(ep, &c, 1); /* copies into it are under way */
		OK(scif_unregister(ep, AT, 2 * MB));
		munmap(p, 2 * MB);
		/* its pages are free: whoever gets them next must not see a byte of the copies */
		q = pages(2 * MB / PG);
		EQ(scif_register(ep, q, 2 * MB, 2 * AT, RW, SCIF_MAP_FIXED), 2 * AT);
		memset(q, 0x5a, 2 * MB);
		send_all(ep, "u", 1);
		recv_all(ep, &c, 1); /* all copies have ended */
		for (int i = 0; i < 2 * MB; i++)
			EQ(q[i], 0x5a);
		OK(scif_unregister(ep, 2 * AT, 2 * MB));
		munmap(q, 2 * MB);
		if (c == 'e')
			break;
	}
	send_all(ep, "x", 1);
	until_closed(ep);
}

TEST(scif_114_unregister_waits_for_asynchronous_copies)
{
	pid_t pid;
	int ep = with_peer(come_and_go, &pid);
	char *l = expose(ep, OWN), c;

	memset(l, 0xee, AREA);
	for (int round = 0; round < 15; round++) {
		recv_all(ep, &c, 1);
		for (int k = 0; k < 6; k++)
			OK(scif_writeto(ep, OWN + k * 64 * PG, 2 * MB, AT, 0));
		send_all(ep, "i", 1);
		recv_all(ep, &c, 1);
		FAILS(scif_writeto(ep, OWN, 2 * MB, AT, 0), ENXIO);
		fence(ep);
		send_all(ep, round == 14 ? "e" : "c", 1);
	}
	recv_all(ep, &c, 1);
	OK(scif_close(ep));
	reap(pid);
}

TEST(scif_114_own_unregister_and_munmap_during_asynchronous_copies)
{
	pid_t pid;
	int ep = with_peer(expose_only, &pid);
	char *v = malloc(2 * MB);

	meet(ep);
	for (int round = 1; round < 20; round++) {
		char *l = pages(2 * MB / PG), *other;
		off_t off = scif_register(ep, l, 2 * MB, 0, RW, 0);

		CHECK(off >= 0);
		fill(l, 2 * MB, round);
		OK(scif_writeto(ep, off, 2 * MB, AT, 0));
		OK(scif_unregister(ep, off, 2 * MB));
		munmap(l, 2 * MB);
		other = pages(2 * MB / PG);
		off = scif_register(ep, other, 2 * MB, 0, RW, 0);
		memset(other, 0x77, 2 * MB);
		fence(ep);
		OK(scif_vreadfrom(ep, v, 2 * MB, AT, SCIF_RMA_SYNC));
		verify(v, 2 * MB, round, "what the source held");
		OK(scif_unregister(ep, off, 2 * MB));
		munmap(other, 2 * MB);
	}
	OK(scif_close(ep));
	reap(pid);
}

TEST(scif_113_close_with_copies_under_way)
{
	for (int round = 0; round < 10; round++) {
		pid_t pid;
		int ep = with_peer(expose_only, &pid);
		char *l = expose(ep, OWN);

		meet(ep);
		for (int k = 0; k < 4; k++)
			OK(scif_writeto(ep, OWN, 4 * MB, AT, 0));
		if (round & 1) {
			kill(pid, SIGKILL);
			CHECK(waitpid(pid, NULL, 0) == pid);
			EVENTUALLY(scif_writeto(ep, OWN, 64, AT, SCIF_RMA_SYNC) < 0);
			CHECK(errno == ECONNRESET || errno == ENXIO);
		}
		OK(scif_close(ep));
		if (!(round & 1))
			reap(pid);
		munmap(l, AREA);
	}
}

/* --- told by test_copies.py what to do; DIALOG is the case ------------------------------------------ */

static void say(const char *word)
{
	printf("%s\n", word);
	fflush(stdout);
}

static void hear(const char *word)
{
	char line[64];

	CHECK(fgets(line, sizeof line, stdin));
	CHECK(!strncmp(line, word, strlen(word)));
}

static void *wait_mark(void *arg)
{
	int *a = arg;

	a[1] = scif_fence_wait(a[0], a[1]) ? errno : 0;
	return NULL;
}

/* A copy, and a wait for it in another thread, while somebody stops the channel. */
TEST(dialog)
{
	const char *how = getenv("DIALOG"), *with = getenv("FLAGS");
	int flags = with ? atoi(with) : 0;
	pid_t pid;

	if (!how)
		return;
	int ep = with_peer(expose_only, &pid), a[2] = { ep, 0 }, n = atoi(how), mark;
	char *l = expose(ep, OWN), *v = malloc(4 * MB);
	pthread_t t;

	fill(l, 4 * MB, 3);
	meet(ep);
	say("ready");
	hear("copy");
	for (int k = 0; k < n; k++)
		OK(scif_writeto(ep, OWN, 4 * MB, AT, flags));
	OK(scif_fence_mark(ep, SELF, &a[1]));
	mark = a[1];
	CHECK(!pthread_create(&t, NULL, wait_mark, a));
	OK(scif_vreadfrom(ep, v, 4 * MB, AT, SCIF_RMA_SYNC));
	say(memcmp(v, l, 4 * MB) ? "under way" : "copied");
	pthread_join(t, NULL);
	printf("%d\n", a[1]);
	int again = scif_fence_wait(ep, mark) ? errno : 0;

	CHECK(again == a[1] || again == ECONNRESET); /* the same, unless the card went meanwhile */
	if (scif_vreadfrom(ep, v, 4 * MB, AT, SCIF_RMA_SYNC) < 0) {
		EQ(errno, ECONNRESET);
		say("disconnected");
	} else {
		say(memcmp(v, l, 4 * MB) ? "not copied" : "copied");
	}
	hear("end");
	OK(scif_close(ep));
	reap(pid);
	say("closed");
}
