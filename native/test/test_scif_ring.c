/* SCIF byte rings with both ends at work in two threads, both ways at once (SCIF 3.2). */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>

#include "harness.h"
#include "lab.h"
#include "mic/scif_ring.h"

#define PAGE  4096u
#define BYTES (1u << 20) /* each way */

struct end {
	struct mic_scif_tx tx;
	struct mic_scif_rx rx;
	uint64_t state;
	uint8_t salt; /* of what this end sends; the other one's is its complement */
	uint32_t sent, got;
};

static uint8_t byte_at(uint32_t pos, uint8_t salt)
{
	return (uint8_t)(pos * 7 + (pos >> 8) + salt);
}

/* Put up to `most` more bytes; -EPROTO, or how many. */
static int put(struct end *e, uint32_t most)
{
	uint8_t data[512];
	uint32_t n = 1 + lab_random(&e->state) % most, left = BYTES - e->sent;

	n = n < left ? n : left;
	for (uint32_t i = 0; i < n; i++)
		data[i] = byte_at(e->sent + i, e->salt);
	int rc = mic_scif_tx_put(&e->tx, data, n);

	if (rc == -EAGAIN)
		return 0;
	if (rc < 0)
		return rc;
	e->sent += n;
	if (lab_random(&e->state) % 4 || e->sent == BYTES) /* now and then several with one commit */
		mic_scif_tx_commit(&e->tx);
	return (int)n;
}

/* Take some of what is there; -EPROTO, -EIO for a wrong byte, or how many. */
static int get(struct end *e, uint32_t most)
{
	uint8_t data[512];
	int used = mic_scif_rx_used(&e->rx);

	if (used <= 0)
		return used;
	uint32_t n = 1 + lab_random(&e->state) % most;

	n = n < (uint32_t)used ? n : (uint32_t)used;
	int rc = mic_scif_rx_get(&e->rx, data, n);

	if (rc < 0)
		return rc;
	mic_scif_rx_release(&e->rx);
	for (uint32_t i = 0; i < n; i++)
		if (data[i] != byte_at(e->got + i, (uint8_t)~e->salt))
			return -EIO;
	e->got += n;
	return (int)n;
}

static void *work(void *arg)
{
	struct end *e = arg;
	uint32_t most = e->tx.limit < 512 ? e->tx.limit : 512;

	while (e->sent < BYTES || e->got < BYTES) {
		int a = e->sent < BYTES ? put(e, most) : 0, b = get(e, most);

		CHECK_IN_THREAD(a >= 0 && b >= 0);
		if (!a && !b) {
			mic_scif_tx_commit(&e->tx); /* nobody waits for what is not published */
			sched_yield();
		}
	}
	return NULL;
}

static void exchange(uint32_t size, uint32_t limit)
{
	static uint8_t memory[2][PAGE + 64 * 1024] __attribute__((aligned(4096)));
	struct mic_scif_qpage *page[2] = {(void *)memory[0], (void *)memory[1]};
	struct end end[2] = {{.state = size, .salt = 3}, {.state = ~size, .salt = (uint8_t)~3}};
	pthread_t t;

	memset(memory, 0, sizeof memory);
	for (int i = 0; i < 2; i++)
		mic_scif_rings_init(&end[i].tx, &end[i].rx, page[i], page[!i], memory[!i] + PAGE, size,
				    limit);
	CHECK(pthread_create(&t, NULL, work, &end[1]) == 0);
	work(&end[0]);
	pthread_join(t, NULL);
	CHECK(end[0].got == BYTES && end[1].got == BYTES);
}

TEST(scif_3_2_node_queue)
{
	exchange(64 * 1024, 64 * 1024 - 1);
}

TEST(scif_3_2_endpoint_ring_with_a_limit)
{
	exchange(4096, 4032);
}

TEST(scif_3_2_smallest_ring)
{
	exchange(4, 3);
}
