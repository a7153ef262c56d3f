/* A span of the card's disk over its NBD socket: every sector's content names the write that made it. */
#include "soak.h"

#include <endian.h>
#include <sys/socket.h>
#include <sys/un.h>

#define SECTOR 512u
#define SPAN   8192u /* sectors */
#define MOST   256u  /* sectors of a request */

enum { NBD_READ = 0, NBD_WRITE = 1, NBD_FLUSH = 3 };

struct __attribute__((packed)) request {
	uint32_t magic;
	uint16_t flags, type;
	uint64_t cookie, offset;
	uint32_t length;
};

struct disk {
	const struct disk_span *span;
	struct link link;
	uint32_t made[SPAN]; /* the write that each sector is from */
	uint64_t cookie;
	char data[MOST * SECTOR];
};

static uint64_t seed_of(const struct disk *d, uint32_t sector, uint32_t write)
{
	return d->span->seed + ((uint64_t)sector << 32 | write);
}

static bool is_from(const struct disk *d, uint32_t i, uint32_t sector, uint32_t write)
{
	return differs(d->data + i * SECTOR, SECTOR, seed_of(d, sector, write), 0) == SECTOR;
}

static uint32_t call(struct disk *d, int type, uint32_t sector, uint32_t n)
{
	struct __attribute__((packed)) {
		uint32_t magic, error;
		uint64_t cookie;
	} reply;
	uint64_t at = type == NBD_FLUSH ? 0 : (d->span->first + sector) * SECTOR;
	struct request r = {htobe32(0x25609513), 0,           htobe16(type),
			    ++d->cookie,         htobe64(at), htobe32(n * SECTOR)};

	put(&d->link, &r, sizeof r);
	if (type == NBD_WRITE)
		put(&d->link, d->data, n * SECTOR);
	get(&d->link, &reply, sizeof reply);
	if (be32toh(reply.magic) != 0x67446698 || reply.cookie != d->cookie) {
		wrong(d->span->row, "a reply to another request: magic %x", be32toh(reply.magic));
		exit(1);
	}
	if (!reply.error && type == NBD_READ)
		get(&d->link, d->data, n * SECTOR);
	return be32toh(reply.error);
}

/* An error is right when it is one of the disk's two and the fault of the moment may cause it. */
static void judge_error(struct disk *d, uint32_t error, const char *what)
{
	count(&d->span->row->errors, 1);
	/* NBD has no EOPNOTSUPP below its own numbers: 95 is ENOTSUP, 5 EIO. */
	if (!(seen(&page->disk_may) & (MAY_FAIL | MAY_TEAR)) || (error != EIO && error != ENOTSUP))
		wrong(d->span->row, "%s: error %u", what, error);
}

static void read_back(struct disk *d, uint32_t sector, uint32_t n)
{
	uint32_t error;

	while ((error = call(d, NBD_READ, sector, n)))
		judge_error(d, error, "read");
}

/* Sectors from `sector` on are a prefix of write `made`, and behind it as they were; the prefix's length. */
static uint32_t prefix(struct disk *d, uint32_t sector, uint32_t n, uint32_t made)
{
	uint32_t kept = 0;

	read_back(d, sector, n);
	while (kept < n && is_from(d, kept, sector + kept, made))
		d->made[sector + kept++] = made;
	for (uint32_t i = kept; i < n; i++)
		if (!is_from(d, i, sector + i, d->made[sector + i]))
			wrong(d->span->row, "sector %lu is neither old nor new after a torn write",
			      d->span->first + sector + i);
	return kept;
}

static void write_some(struct disk *d, uint32_t sector, uint32_t n, uint32_t made)
{
	for (uint32_t i = 0; i < n; i++)
		pattern(d->data + i * SECTOR, SECTOR, seed_of(d, sector + i, made), 0);
	uint32_t error = call(d, NBD_WRITE, sector, n);

	if (error)
		judge_error(d, error, "write");
	if (seen(&page->disk_may) & MAY_TEAR)
		count(&d->span->row->torn, prefix(d, sector, n, made) < n);
	else if (!error)
		for (uint32_t i = 0; i < n; i++)
			d->made[sector + i] = made;
}

static void check(struct disk *d, uint32_t sector, uint32_t n)
{
	read_back(d, sector, n);
	for (uint32_t i = 0; i < n; i++)
		if (!is_from(d, i, sector + i, d->made[sector + i]))
			wrong(d->span->row, "sector %lu is not from write %u", d->span->first + sector + i,
			      d->made[sector + i]);
}

static void connect_to(struct disk *d)
{
	struct sockaddr_un at = {.sun_family = AF_UNIX};
	struct __attribute__((packed)) {
		uint32_t flags;
		char magic[8];
		uint32_t option, length;
	} hello = {htobe32(3), "IHAVEOPT", htobe32(1), 0};
	char greeting[18], export[10];

	strncpy(at.sun_path, d->span->nbd, sizeof at.sun_path - 1);
	d->link = tcp_link;
	d->link.fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (connect(d->link.fd, (struct sockaddr *)&at, sizeof at))
		die(d->span->nbd);
	get(&d->link, greeting, sizeof greeting);
	put(&d->link, &hello, sizeof hello);
	get(&d->link, export, sizeof export);
}

void *disk_work(void *arg)
{
	const struct disk_span *span = arg;
	struct disk *d = (struct disk *)pages(sizeof *d);
	uint64_t state = span->seed;

	d->span = span;
	connect_to(d);
	for (uint32_t at = 0; at < SPAN; at += MOST)
		write_some(d, at, MOST, 0);
	for (uint32_t made = 1; !seen(&page->stop); made++) {
		uint32_t n = 1 + dice(&state) % MOST, sector = dice(&state) % (SPAN - n + 1), error;

		write_some(d, sector, n, made);
		sector = dice(&state) % (SPAN - n + 1);
		check(d, sector, n);
		if (made % 64 == 0 && (error = call(d, NBD_FLUSH, 0, 0)))
			judge_error(d, error, "flush");
		count(&span->row->bytes, 2 * n * SECTOR);
		count(&span->row->rounds, 1);
	}
	for (uint32_t at = 0; at < SPAN; at += MOST)
		check(d, at, MOST);
	return NULL;
}
