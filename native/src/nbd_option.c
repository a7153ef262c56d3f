/* NBD: greeting and option haggling (fixed newstyle). */
#include <endian.h>
#include <string.h>

#include "nbd_internal.h"

#define FEATURE(bit) (1ull << (bit))

/* The longest single answer; without that much room the client has to read first. */
#define ANSWER_ROOM 1024u

static void put(struct nbd_client *c, const void *bytes, uint32_t len)
{
	memcpy(c->outbuf + c->out_len, bytes, len);
	c->out_len += len;
}

static void put16(struct nbd_client *c, uint16_t v)
{
	v = htobe16(v);
	put(c, &v, sizeof v);
}

static void put32(struct nbd_client *c, uint32_t v)
{
	v = htobe32(v);
	put(c, &v, sizeof v);
}

static void put64(struct nbd_client *c, uint64_t v)
{
	v = htobe64(v);
	put(c, &v, sizeof v);
}

uint16_t nbd_transmission_flags(const struct mic_nbd *nbd)
{
	uint64_t f = mic_blk_drv_features(nbd->drv);
	unsigned flags = NBD_TF_HAS_FLAGS | NBD_TF_SEND_DF | NBD_TF_MULTI_CONN;

	if (nbd->read_only)
		return (uint16_t)(flags | NBD_TF_READ_ONLY);
	if (f & FEATURE(MIC_VIRTIO_BLK_F_FLUSH))
		flags |= NBD_TF_SEND_FLUSH | NBD_TF_SEND_FUA;
	if (f & FEATURE(MIC_VIRTIO_BLK_F_DISCARD))
		flags |= NBD_TF_SEND_TRIM;
	if (f & FEATURE(MIC_VIRTIO_BLK_F_WRITE_ZEROES))
		flags |= NBD_TF_SEND_WRITE_ZEROES;
	return (uint16_t)flags;
}

static uint64_t export_size(const struct mic_nbd *nbd)
{
	return mic_blk_drv_capacity(nbd->drv) * MIC_BLK_SECTOR;
}

void nbd_greet(struct nbd_client *c)
{
	put64(c, NBD_MAGIC);
	put64(c, NBD_IHAVEOPT);
	put16(c, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
}

static void reply(struct nbd_client *c, uint32_t option, uint32_t type, uint32_t len)
{
	put64(c, NBD_REP_MAGIC);
	put32(c, option);
	put32(c, type);
	put32(c, len);
}

static uint32_t load32(const uint8_t *p)
{
	uint32_t v;

	memcpy(&v, p, sizeof v);
	return be32toh(v);
}

static uint16_t load16(const uint8_t *p)
{
	uint16_t v;

	memcpy(&v, p, sizeof v);
	return be16toh(v);
}

static bool known_name(const struct mic_nbd *nbd, const uint8_t *name, uint32_t len)
{
	return !len || (len == strlen(nbd->name) && !memcmp(name, nbd->name, len));
}

/* The oldest way in: no reply block, only the export, or the end of the connection. */
static void option_export_name(struct nbd_client *c, const uint8_t *data, uint32_t len)
{
	static const uint8_t zeroes[124];

	if (!known_name(c->nbd, data, len)) {
		nbd_bad_client(c);
		return;
	}
	put64(c, export_size(c->nbd));
	put16(c, nbd_transmission_flags(c->nbd));
	if (!c->no_zeroes)
		put(c, zeroes, sizeof zeroes);
	c->phase = NBD_TRANSMISSION;
}

static void option_list(struct nbd_client *c, uint32_t len)
{
	uint32_t n = (uint32_t)strlen(c->nbd->name);

	if (len) {
		reply(c, NBD_OPT_LIST, NBD_REP_ERR_INVALID, 0);
		return;
	}
	reply(c, NBD_OPT_LIST, NBD_REP_SERVER, 4 + n);
	put32(c, n);
	put(c, c->nbd->name, n);
	reply(c, NBD_OPT_LIST, NBD_REP_ACK, 0);
}

static void info_export(struct nbd_client *c, uint32_t option)
{
	reply(c, option, NBD_REP_INFO, 12);
	put16(c, NBD_INFO_EXPORT);
	put64(c, export_size(c->nbd));
	put16(c, nbd_transmission_flags(c->nbd));
}

static void info_more(struct nbd_client *c, uint32_t option, uint16_t info)
{
	uint32_t n = (uint32_t)strlen(c->nbd->name);

	if (info == NBD_INFO_NAME) {
		reply(c, option, NBD_REP_INFO, 2 + n);
		put16(c, NBD_INFO_NAME);
		put(c, c->nbd->name, n);
	} else if (info == NBD_INFO_BLOCK_SIZE) {
		reply(c, option, NBD_REP_INFO, 14);
		put16(c, NBD_INFO_BLOCK_SIZE);
		put32(c, MIC_BLK_SECTOR);
		put32(c, 4096);
		put32(c, MIC_NBD_MAX_PAYLOAD);
	}
}

/* INFO and GO: name length, name, number of requests, requests. */
static void option_go(struct nbd_client *c, uint32_t option, const uint8_t *data, uint32_t len)
{
	uint32_t name_len = len >= 4 ? load32(data) : 0;
	bool asked[2] = {false, false};

	if (len < 6 || name_len > len - 6 || len - 6 - name_len != 2u * load16(data + 4 + name_len)) {
		reply(c, option, NBD_REP_ERR_INVALID, 0);
		return;
	}
	if (!known_name(c->nbd, data + 4, name_len)) {
		reply(c, option, NBD_REP_ERR_UNKNOWN, 0);
		return;
	}
	for (const uint8_t *p = data + 6 + name_len; p < data + len; p += 2) {
		asked[0] |= load16(p) == NBD_INFO_NAME;
		asked[1] |= load16(p) == NBD_INFO_BLOCK_SIZE;
	}
	info_export(c, option);
	if (asked[0])
		info_more(c, option, NBD_INFO_NAME);
	if (asked[1])
		info_more(c, option, NBD_INFO_BLOCK_SIZE);
	reply(c, option, NBD_REP_ACK, 0);
	if (option == NBD_OPT_GO)
		c->phase = NBD_TRANSMISSION;
}

static void take_option(struct nbd_client *c, uint32_t option, const uint8_t *data, uint32_t len)
{
	switch (option) {
	case NBD_OPT_EXPORT_NAME:
		option_export_name(c, data, len);
		break;
	case NBD_OPT_ABORT:
		reply(c, option, NBD_REP_ACK, 0);
		c->closing = true;
		break;
	case NBD_OPT_LIST:
		option_list(c, len);
		break;
	case NBD_OPT_INFO:
	case NBD_OPT_GO:
		option_go(c, option, data, len);
		break;
	case NBD_OPT_STRUCTURED_REPLY:
		reply(c, option, len ? NBD_REP_ERR_INVALID : NBD_REP_ACK, 0);
		c->structured |= !len;
		break;
	default:
		reply(c, option, NBD_REP_ERR_UNSUP, 0);
		break;
	}
}

static bool take_flags(struct nbd_client *c)
{
	if (c->in_len - c->in_at < 4)
		return false;
	uint32_t flags = load32(c->inbuf + c->in_at);

	c->in_at += 4;
	if (flags & ~(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)) {
		nbd_bad_client(c);
		return false;
	}
	c->no_zeroes = flags & NBD_FLAG_NO_ZEROES;
	c->phase = NBD_OPTIONS;
	return true;
}

bool nbd_negotiate(struct nbd_client *c)
{
	struct nbd_option o;
	uint32_t have = c->in_len - c->in_at;

	if (c->closing)
		return false;
	if (c->phase == NBD_GREETING)
		return take_flags(c);
	if (NBD_OUTBUF - c->out_len < ANSWER_ROOM)
		return false;
	if (c->skipped_option) {
		reply(c, c->skipped_option, NBD_REP_ERR_TOO_BIG, 0);
		c->skipped_option = 0;
		return true;
	}
	if (have < sizeof o)
		return false;
	memcpy(&o, c->inbuf + c->in_at, sizeof o);
	uint32_t option = be32toh(o.option), len = be32toh(o.length);

	if (be64toh(o.magic) != NBD_IHAVEOPT || len > 1u << 20) {
		nbd_bad_client(c);
		return false;
	}
	if (len > NBD_MAX_OPTION) {
		c->in_at += sizeof o;
		c->skip = len;
		c->skipped_option = option ? option : UINT32_MAX;
		return true;
	}
	if (have < sizeof o + len)
		return false;
	c->in_at += (uint32_t)sizeof o + len;
	take_option(c, option, c->inbuf + c->in_at - len, len);
	return true;
}
