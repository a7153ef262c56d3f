/* The NBD protocol's numbers and structs. Everything is big-endian on the wire. */
#ifndef MIC_NBD_PROTO_H
#define MIC_NBD_PROTO_H

#include <stdint.h>

#define NBD_MAGIC            0x4e42444d41474943ull /* NBDMAGIC */
#define NBD_IHAVEOPT         0x49484156454f5054ull
#define NBD_REP_MAGIC        0x3e889045565a9ull
#define NBD_REQUEST_MAGIC    0x25609513u
#define NBD_SIMPLE_MAGIC     0x67446698u
#define NBD_STRUCTURED_MAGIC 0x668e33efu

#define NBD_FLAG_FIXED_NEWSTYLE 1u
#define NBD_FLAG_NO_ZEROES      2u

#define NBD_OPT_EXPORT_NAME      1u
#define NBD_OPT_ABORT            2u
#define NBD_OPT_LIST             3u
#define NBD_OPT_INFO             6u
#define NBD_OPT_GO               7u
#define NBD_OPT_STRUCTURED_REPLY 8u

#define NBD_REP_ACK         1u
#define NBD_REP_SERVER      2u
#define NBD_REP_INFO        3u
#define NBD_REP_ERR_UNSUP   0x80000001u
#define NBD_REP_ERR_INVALID 0x80000003u
#define NBD_REP_ERR_UNKNOWN 0x80000006u
#define NBD_REP_ERR_TOO_BIG 0x80000009u

#define NBD_INFO_EXPORT     0u
#define NBD_INFO_NAME       1u
#define NBD_INFO_BLOCK_SIZE 3u

#define NBD_TF_HAS_FLAGS         1u
#define NBD_TF_READ_ONLY         2u
#define NBD_TF_SEND_FLUSH        4u
#define NBD_TF_SEND_FUA          8u
#define NBD_TF_SEND_TRIM         32u
#define NBD_TF_SEND_WRITE_ZEROES 64u
#define NBD_TF_SEND_DF           128u
#define NBD_TF_MULTI_CONN        256u

#define NBD_CMD_READ         0u
#define NBD_CMD_WRITE        1u
#define NBD_CMD_DISC         2u
#define NBD_CMD_FLUSH        3u
#define NBD_CMD_TRIM         4u
#define NBD_CMD_WRITE_ZEROES 6u

#define NBD_CMD_FLAG_FUA     1u
#define NBD_CMD_FLAG_NO_HOLE 2u
#define NBD_CMD_FLAG_DF      4u

#define NBD_EPERM     1u
#define NBD_EIO       5u
#define NBD_ENOMEM    12u
#define NBD_EINVAL    22u
#define NBD_ENOSPC    28u
#define NBD_EOVERFLOW 75u
#define NBD_ENOTSUP   95u
#define NBD_ESHUTDOWN 108u

#define NBD_REPLY_FLAG_DONE   1u
#define NBD_REPLY_NONE        0u
#define NBD_REPLY_OFFSET_DATA 1u
#define NBD_REPLY_ERROR       0x8001u

#define NBD_MAX_OPTION 4096u /* longer options are skipped and refused */
#define NBD_MAX_NAME   255u

struct nbd_option {
	uint64_t magic;
	uint32_t option, length;
} __attribute__((packed));

struct nbd_option_reply {
	uint64_t magic;
	uint32_t option, type, length;
} __attribute__((packed));

struct nbd_request {
	uint32_t magic;
	uint16_t flags, type;
	uint64_t cookie, offset;
	uint32_t length;
} __attribute__((packed));

struct nbd_simple_reply {
	uint32_t magic, error;
	uint64_t cookie;
} __attribute__((packed));

struct nbd_chunk {
	uint32_t magic;
	uint16_t flags, type;
	uint64_t cookie;
	uint32_t length;
} __attribute__((packed));

_Static_assert(sizeof(struct nbd_option) == 16, "option");
_Static_assert(sizeof(struct nbd_option_reply) == 20, "option reply");
_Static_assert(sizeof(struct nbd_request) == 28, "request");
_Static_assert(sizeof(struct nbd_simple_reply) == 16, "simple reply");
_Static_assert(sizeof(struct nbd_chunk) == 20, "chunk");

#endif
