/* Marks and signals for copies that DMA channels make while the program goes on (SCIF-115..124). */
#include "copies.h"

#define THREADS 4
#define PART    (AREA / THREADS)

struct worker { int ep, id; };
static void *work(void *arg)
{
	const struct worker *w = arg;
	off_t at = w->id * PART;
	char *own = pages(PART / PG), *back = malloc(PART);
	off_t off = scif_register(w->ep, own, PART, 0, RW, 0);

	CHECK(off >= 0);
	for (int round = 1; round <= 12; round++) {
		int seed = w->id * 100 + round, mark;

		fill(own, PART, seed);
		/* by a channel, or by this thread while channels work for the others */
		if (round % 3) {
			OK(scif_writeto(w->ep, off, PART, AT + at, round & 1 ? SCIF_RMA_ORDERED : 0));
		} else {
			OK(scif_writeto(w->ep, off, MB, AT + at, 0));
			OK(scif_writeto(w->ep, off + MB, PART - MB, AT + at + MB, SCIF_RMA_USECPU));
		}
		OK(scif_fence_mark(w->ep, SELF, &mark));
		OK(scif_fence_wait(w->ep, mark));
		OK(scif_vreadfrom(w->ep, back, PART, AT + at, SCIF_RMA_SYNC));
		verify(back, PART, seed, "a thread's part");
	}
	OK(scif_unregister(w->ep, off, PART));
	munmap(own, PART);
	free(back);
	return NULL;
}

TEST(scif_118_marks_of_several_threads_on_one_endpoint)
{
	struct worker w[THREADS];
	pthread_t t[THREADS];
	pid_t pid;
	int ep = with_peer(expose_only, &pid);

	meet(ep);
	for (int i = 0; i < THREADS; i++) {
		w[i] = (struct worker){ ep, i };
		CHECK(!pthread_create(&t[i], NULL, work, &w[i]));
	}
	for (int i = 0; i < THREADS; i++)
		pthread_join(t[i], NULL);
	OK(scif_close(ep));
	reap(pid);
}

/* Rounds of large copies into the other side, each announced by a byte when it was issued. */
static void write_to_peer(int ep)
{
	char *l = pages(4 * MB / PG), c;
	off_t off = scif_register(ep, l, 4 * MB, 0, RW, 0);

	CHECK(off >= 0);
	meet(ep);
	for (int round = 1; round < 12; round++) {
		fill(l, 4 * MB, round);
		OK(scif_writeto(ep, off, 2 * MB, OWN, 0));
		OK(scif_writeto(ep, off + 2 * MB, 2 * MB, OWN + 2 * MB, 0));
		send_all(ep, "i", 1);
		recv_all(ep, &c, 1); /* they have looked */
		memset(l, 0, 4 * MB);
	}
	until_closed(ep);
}

TEST(scif_117_118_a_peers_mark_covers_what_the_peer_issued_before)
{
	pid_t pid;
	int ep = with_peer(write_to_peer, &pid), mark;
	char *p = expose(ep, OWN), c;

	meet(ep);
	for (int round = 1; round < 12; round++) {
		recv_all(ep, &c, 1);
		OK(scif_fence_mark(ep, PEER, &mark));
		OK(scif_fence_wait(ep, mark));
		verify(p, 4 * MB, round, "behind the peer's mark");
		OK(scif_fence_wait(ep, mark));
		send_all(ep, &c, 1);
	}
	OK(scif_close(ep));
	reap(pid);
}

TEST(scif_123_124_a_signal_that_the_peer_writes_comes_after_its_copies)
{
	pid_t pid;
	int ep = with_peer(write_to_peer, &pid);
	char *p = expose(ep, OWN), c;

	meet(ep);
	for (int round = 1; round < 12; round++) {
		/* multiples of 8, and of 4 only: the second kind is not the channel's */
		off_t at = 5 * MB + (round & 1 ? 0 : 12);
		uint64_t v = 0;

		recv_all(ep, &c, 1);
		OK(scif_fence_signal(ep, OWN + at, (uint64_t)round, 0, 0, PEER | SCIF_SIGNAL_REMOTE));
		while (v != (uint64_t)round) {
			__atomic_thread_fence(__ATOMIC_ACQUIRE);
			memcpy(&v, p + at, sizeof v);
			sched_yield();
		}
		verify(p, 4 * MB, round, "behind the peer's signal");
		send_all(ep, &c, 1);
	}
	OK(scif_close(ep));
	reap(pid);
}

static void poll_flag(int ep)
{
	char *p = expose(ep, AT);

	meet(ep);
	for (uint64_t round = 1; round < 20; round++) {
		size_t at = 5 * MB + (round & 1 ? 0 : 4);
		uint64_t v = 0;

		while (v != round) {
			__atomic_thread_fence(__ATOMIC_ACQUIRE);
			memcpy(&v, p + at, sizeof v);
			sched_yield();
		}
		verify(p, 4 * MB, (int)round, "behind the signal");
		send_all(ep, "k", 1);
	}
	until_closed(ep);
}

TEST(scif_121_124_signals_come_after_asynchronous_copies)
{
	pid_t pid;
	int ep = with_peer(poll_flag, &pid), S = SELF | SCIF_SIGNAL_REMOTE;
	char *l = expose(ep, OWN), c;

	meet(ep);
	for (uint64_t round = 1; round < 20; round++) {
		off_t at = 5 * MB + (round & 1 ? 0 : 4);
		bool both = round % 3 == 0;

		fill(l, 4 * MB, (int)round);
		OK(scif_writeto(ep, OWN, 2 * MB, AT, 0));
		OK(scif_writeto(ep, OWN + 2 * MB, 2 * MB, AT + 2 * MB, 0));
		FAILS(scif_fence_signal(ep, 0, 1, AT + AREA - 4, 1, S), ENXIO);
		OK(scif_fence_signal(ep, OWN + 5 * MB, round, AT + at, round, both ? S | SCIF_SIGNAL_LOCAL : S));
		recv_all(ep, &c, 1);
		if (both)
			EVENTUALLY(__atomic_load_n((uint64_t *)(l + 5 * MB), __ATOMIC_ACQUIRE) == round);
		fence(ep);
	}
	OK(scif_close(ep));
	reap(pid);
}

TEST(scif_118_a_mark_that_was_never_given_does_not_hang)
{
	pid_t pid;
	int ep = with_peer(expose_only, &pid);

	expose(ep, OWN);
	meet(ep);
	if (node_a() || node_b())
		for (int i = 0; i < 2; i++) {
			OK(scif_fence_wait(ep, 0x12345678));
			OK(scif_fence_wait(ep, 0));
			OK(scif_fence_wait(ep, 0x3fffffff));
			OK(scif_writeto(ep, OWN, 2 * MB, AT, 0));
		}
	OK(scif_close(ep));
	reap(pid);
}
