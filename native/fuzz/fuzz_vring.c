/* Fuzz target: the walk of a vring that a hostile card filled, against an independent reading of the
 * rules (VOP 6.5, 9.1; VOP-44..49).
 *
 * Input: byte 0 ring size and features, byte 1 segments that the device takes, bytes 2-3 avail.idx, then
 * the available entries (2 bytes each, up to 8), then descriptors of 6 bytes: place, length, flags,
 * next. The first num go into the ring, the rest into an indirect table in GDDR. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../test/lab.h"
#include "fuzz.h"
#include "mic/vring.h"

#define GDDR    (256 * KIB)
#define BLOCK   0x10000ull
#define USED    0x8000ull
#define TABLE   0x9000ull
#define ENTRIES 8u
#define MAX_IOV 256u

static struct lab lab;

struct model {
	unsigned num, table_entries, max;
	bool indirect_ok;
	struct mic_vring_desc ring[128], table[128];
	unsigned n, out;
	struct iovec seg[MAX_IOV];
	bool writable_seen;
};

/* A few shapes of address: inside, at the end, outside, wrapping, the table, the host's window. */
static uint64_t address(uint8_t place, uint32_t len)
{
	switch (place >> 5) {
	case 0:
	case 1:
		return (place & 63) * 1024u;
	case 2:
		return GDDR - len;
	case 3:
		return GDDR - len + 1 + (place & 31);
	case 4:
		return TABLE;
	case 5:
		return UINT64_MAX - (place & 31);
	case 6:
		return MIC_SMPT_BASE + (place & 31);
	default:
		return TABLE + (place & 31) * 16u;
	}
}

static struct mic_vring_desc descriptor(const uint8_t *p)
{
	uint32_t len = (uint32_t)p[1] | (uint32_t)p[2] << 8;

	if (p[3] & 0x80)
		len = (p[1] & 15) * 16u; /* a size that fits a table */
	if (p[3] & 0x40)
		len |= 0xffff0000u;
	return (struct mic_vring_desc){
		.addr = address(p[0], len),
		.len = len,
		.flags = p[3] & 0x3f & ~(p[3] & 0x38),
		.next = p[4] == 0xff ? (uint16_t)(0xff00 | p[5]) : p[4],
	};
}

/* One data descriptor by the rules: 0 or the errno. */
static int model_data(struct model *m, const struct mic_vring_desc *d)
{
	bool writable = d->flags & MIC_VRING_DESC_F_WRITE;

	if (!d->len)
		return 0;
	if (!writable && m->writable_seen)
		return EINVAL;
	if (d->addr > GDDR || d->len > GDDR - d->addr)
		return EFAULT;
	if (m->n == m->max)
		return ENOSPC;
	m->seg[m->n++] = (struct iovec){mic_bus_gddr(lab.bus) + d->addr, d->len};
	m->writable_seen |= writable;
	m->out += !writable;
	return 0;
}

static int model_table(struct model *m, const struct mic_vring_desc *d)
{
	struct mic_vring_desc table[128];
	unsigned entries = d->len / 16, i = 0;

	if (!m->indirect_ok || d->flags & (MIC_VRING_DESC_F_NEXT | MIC_VRING_DESC_F_WRITE))
		return EINVAL;
	if (!entries || d->len % 16 || entries > 128)
		return EINVAL;
	if (d->addr > GDDR || d->len > GDDR - d->addr)
		return EFAULT;
	memcpy(table, mic_bus_gddr(lab.bus) + d->addr, d->len);
	for (unsigned steps = 0; steps <= entries; steps++) {
		if (i >= entries)
			return EINVAL;
		if (steps == entries)
			return ELOOP;
		if (table[i].flags & MIC_VRING_DESC_F_INDIRECT)
			return EINVAL;
		int err = model_data(m, &table[i]);

		if (err || !(table[i].flags & MIC_VRING_DESC_F_NEXT))
			return err;
		i = table[i].next;
	}
	return ELOOP;
}

static int model_chain(struct model *m, unsigned head)
{
	m->n = m->out = 0;
	m->writable_seen = false;
	for (unsigned i = head, steps = 0;; steps++) {
		if (i >= m->num)
			return EINVAL;
		if (steps == m->num)
			return ELOOP;
		const struct mic_vring_desc *d = &m->ring[i];

		if (d->flags & MIC_VRING_DESC_F_INDIRECT)
			return model_table(m, d);
		int err = model_data(m, d);

		if (err || !(d->flags & MIC_VRING_DESC_F_NEXT))
			return err;
		i = d->next;
	}
}

static void check_chain(const struct model *m, const struct mic_chain *c, const struct iovec *iov)
{
	uint64_t len[2] = {0, 0};

	REQUIRE(c->out_num == m->out && c->out_num + c->in_num == m->n);
	for (unsigned i = 0; i < m->n; i++) {
		REQUIRE(iov[i].iov_base == m->seg[i].iov_base && iov[i].iov_len == m->seg[i].iov_len);
		len[i >= c->out_num] += iov[i].iov_len;
	}
	REQUIRE(c->out_len == len[0] && c->in_len == len[1]);
}

static void pop_all(struct model *m, struct mic_vq *vq, const uint16_t *avail, uint16_t idx)
{
	struct iovec iov[MAX_IOV];
	struct mic_chain c;

	for (uint16_t at = 0;; at++) {
		int rc = mic_vq_pop(vq, &c, iov, m->max);

		if (at == idx) {
			REQUIRE(rc == 0);
			return;
		}
		int want = idx > m->num ? EPROTO : model_chain(m, avail[at % m->num]);

		REQUIRE(rc == (want ? -want : 1));
		if (want) {
			REQUIRE(vq->broken && mic_vq_pop(vq, &c, iov, m->max) == -want);
			return;
		}
		check_chain(m, &c, iov);
		mic_vq_push(vq, c.head, 1);
		mic_vq_should_interrupt(vq);
	}
}

static void fill(struct model *m, const uint8_t *data, size_t size)
{
	memset(m->ring, 0, sizeof m->ring);
	memset(m->table, 0, sizeof m->table);
	for (unsigned i = 0; size >= 6 && i < m->num + 128; i++, data += 6, size -= 6) {
		if (i < m->num)
			m->ring[i] = descriptor(data);
		else
			m->table[i - m->num] = descriptor(data);
	}
	memcpy(mic_bus_host(lab.bus) + BLOCK, m->ring, 16 * m->num);
	memcpy(mic_bus_gddr(lab.bus) + TABLE, m->table, sizeof m->table);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct model m;
	uint16_t avail[128] = {0}, idx;
	struct mic_vq vq;
	uint64_t features = 0;

	if (!lab.bus)
		lab_open(&lab, GDDR, 1 * MIB);
	if (size < 4 + 2 * ENTRIES)
		return 0;
	m.num = 1u << (data[0] & 7);
	m.indirect_ok = data[0] & 8;
	features |= m.indirect_ok ? 1ull << MIC_VIRTIO_F_INDIRECT_DESC : 0;
	features |= data[0] & 16 ? 1ull << MIC_VIRTIO_F_EVENT_IDX : 0;
	m.max = data[1];
	memcpy(&idx, data + 2, 2);
	if (idx > 2 * ENTRIES && idx < 0x8000)
		idx %= 2 * ENTRIES;
	REQUIRE(mic_vq_init(&vq, lab.bus, BLOCK, USED, (uint16_t)m.num, features) == 0);
	memcpy(avail, data + 4, 2 * ENTRIES);
	uint8_t *ring = mic_bus_host(lab.bus) + BLOCK + 16 * m.num;

	memcpy(ring + 2, &idx, 2);
	memcpy(ring + 4, avail, 2 * m.num);
	memset(mic_bus_gddr(lab.bus) + USED, 0, 2048);
	fill(&m, data + 4 + 2 * ENTRIES, size - 4 - 2 * ENTRIES);
	pop_all(&m, &vq, avail, idx);
	return 0;
}
