/* SCIF, the Symmetric Communication Interface: the public header of libscif.so.0.
 *
 * The names, values and types are those that programs for the Intel MIC stack use; the manual pages
 * in docs/ describe each call. Every failing call returns -1 (or the cast form of -1) and sets
 * errno; no call changes errno on success. */
#ifndef __SCIF_H__
#define __SCIF_H__

#ifdef __KERNEL__
#error "this is the interface of user programs"
#endif

#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <sys/select.h>
#include <sys/types.h>
#include <unistd.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MICACCESSAPI

typedef int scif_epd_t;

/* A port on a node; node 0 is the host, node n + 1 the card n. */
struct scif_portID {
	uint16_t node;
	uint16_t port;
};

/* Laid out as struct pollfd. */
struct scif_pollepd {
	scif_epd_t epd;
	short events;
	short revents;
};

/* Older names that programs still use. */
#define portID scif_portID
typedef struct portID portID_t;
#define ACCEPT_SYNC SCIF_ACCEPT_SYNC
#define SEND_BLOCK  SCIF_SEND_BLOCK
#define RECV_BLOCK  SCIF_RECV_BLOCK

/* Results of failing calls. */
#define SCIF_OPEN_FAILED     ((scif_epd_t) - 1)
#define SCIF_REGISTER_FAILED ((off_t) - 1)
#define SCIF_MMAP_FAILED     ((void *)-1)

/* Flags of accept, send and recv. */
#define SCIF_ACCEPT_SYNC 1
#define SCIF_SEND_BLOCK  1
#define SCIF_RECV_BLOCK  1

/* Protection of windows and mappings. */
enum { SCIF_PROT_READ = (1 << 0), SCIF_PROT_WRITE = (1 << 1) };

/* Flags of register and mmap. */
enum { SCIF_MAP_FIXED = 0x10, SCIF_MAP_KERNEL = 0x20 };

/* Flags of the fence calls. */
enum {
	SCIF_FENCE_INIT_SELF = (1 << 0),
	SCIF_FENCE_INIT_PEER = (1 << 1),
	SCIF_FENCE_RAS_SELF = (1 << 2),
	SCIF_FENCE_RAS_PEER = (1 << 3),
	SCIF_SIGNAL_LOCAL = (1 << 4),
	SCIF_SIGNAL_REMOTE = (1 << 5)
};

/* Flags of the RMA calls. */
#define SCIF_RMA_USECPU   1
#define SCIF_RMA_USECACHE 2
#define SCIF_RMA_SYNC     4
#define SCIF_RMA_ORDERED  8

/* Events of scif_poll. */
#define SCIF_POLLIN   POLLIN
#define SCIF_POLLOUT  POLLOUT
#define SCIF_POLLERR  POLLERR
#define SCIF_POLLHUP  POLLHUP
#define SCIF_POLLNVAL POLLNVAL

/* Well-known ports. Numbers below SCIF_ADMIN_PORT_END need privilege. */
#define SCIF_COI_PORT_0       40
#define SCIF_COI_PORT_1       41
#define SCIF_COI_PORT_2       42
#define SCIF_COI_PORT_3       43
#define SCIF_COI_PORT_4       44
#define SCIF_COI_PORT_5       45
#define SCIF_COI_PORT_6       46
#define SCIF_COI_PORT_7       47
#define SCIF_COI_PORT_8       48
#define SCIF_COI_PORT_9       49
#define SCIF_OFED_PORT_0      60
#define SCIF_OFED_PORT_1      61
#define SCIF_OFED_PORT_2      62
#define SCIF_OFED_PORT_3      63
#define SCIF_OFED_PORT_4      64
#define SCIF_OFED_PORT_5      65
#define SCIF_OFED_PORT_6      66
#define SCIF_OFED_PORT_7      67
#define SCIF_OFED_PORT_8      68
#define SCIF_OFED_PORT_9      69
#define SCIF_NETDEV_PORT_0    80
#define SCIF_NETDEV_PORT_1    81
#define SCIF_NETDEV_PORT_2    82
#define SCIF_NETDEV_PORT_3    83
#define SCIF_NETDEV_PORT_4    84
#define SCIF_NETDEV_PORT_5    85
#define SCIF_NETDEV_PORT_6    86
#define SCIF_NETDEV_PORT_7    87
#define SCIF_NETDEV_PORT_8    88
#define SCIF_NETDEV_PORT_9    89
#define SCIF_RAS_PORT_0       100
#define SCIF_RAS_PORT_1       101
#define SCIF_RAS_PORT_2       102
#define SCIF_RAS_PORT_3       103
#define SCIF_RAS_PORT_4       104
#define SCIF_RAS_PORT_5       105
#define SCIF_RAS_PORT_6       106
#define SCIF_RAS_PORT_7       107
#define SCIF_RAS_PORT_8       108
#define SCIF_RAS_PORT_9       109
#define SCIF_PM_PORT_0        120
#define SCIF_PM_PORT_1        121
#define SCIF_PM_PORT_2        122
#define SCIF_PM_PORT_3        123
#define SCIF_PM_PORT_4        124
#define SCIF_PM_PORT_5        125
#define SCIF_PM_PORT_6        126
#define SCIF_PM_PORT_7        127
#define SCIF_PM_PORT_8        128
#define SCIF_PM_PORT_9        129
#define SCIF_BT_PORT_0        130
#define SCIF_BT_PORT_1        131
#define SCIF_BT_PORT_2        132
#define SCIF_BT_PORT_3        133
#define SCIF_BT_PORT_4        134
#define SCIF_BT_PORT_5        135
#define SCIF_BT_PORT_6        136
#define SCIF_BT_PORT_7        137
#define SCIF_BT_PORT_8        138
#define SCIF_BT_PORT_9        139
#define MPSSD_MONRECV         160
#define MIC_NOTIFY            161
#define MPSSD_CRED            162
#define MPSSD_MONSEND         163
#define MPSSD_MICCTRL         164
#define MPSSD_RESV5           165
#define MPSSD_RESV6           166
#define MPSSD_RESV7           167
#define MPSSD_RESV8           168
#define MPSSD_RESV9           169
#define SCIF_COSM_LISTEN_PORT 201
#define SCIF_ADMIN_PORT_END   1024
#define SCIF_MYO_PORT_0       1025
#define SCIF_MYO_PORT_1       1026
#define SCIF_MYO_PORT_2       1027
#define SCIF_MYO_PORT_3       1028
#define SCIF_MYO_PORT_4       1029
#define SCIF_MYO_PORT_5       1030
#define SCIF_MYO_PORT_6       1031
#define SCIF_MYO_PORT_7       1032
#define SCIF_MYO_PORT_8       1033
#define SCIF_MYO_PORT_9       1034
#define SCIF_ST_PORT_0        1044
#define SCIF_ST_PORT_1        1045
#define SCIF_ST_PORT_2        1046
#define SCIF_ST_PORT_3        1047
#define SCIF_ST_PORT_4        1048
#define SCIF_ST_PORT_5        1049
#define SCIF_ST_PORT_6        1050
#define SCIF_ST_PORT_7        1051
#define SCIF_ST_PORT_8        1052
#define SCIF_ST_PORT_9        1053
#define SCIF_PORT_RSVD        1088

/* A new endpoint: a descriptor, close-on-exec. */
MICACCESSAPI scif_epd_t scif_open(void);
MICACCESSAPI int scif_close(scif_epd_t epd);
/* Returns the bound port; pn 0 lets the node choose. */
MICACCESSAPI int scif_bind(scif_epd_t epd, uint16_t pn);
MICACCESSAPI int scif_listen(scif_epd_t epd, int backlog);
/* Returns the local port once the peer has accepted. */
MICACCESSAPI int scif_connect(scif_epd_t epd, struct scif_portID *dst);
MICACCESSAPI int scif_accept(scif_epd_t epd, struct scif_portID *peer, scif_epd_t *newepd, int flags);

/* Return the bytes moved, 0..len. */
MICACCESSAPI int scif_send(scif_epd_t epd, void *msg, int len, int flags);
MICACCESSAPI int scif_recv(scif_epd_t epd, void *msg, int len, int flags);

MICACCESSAPI off_t scif_register(scif_epd_t epd, void *addr, size_t len, off_t offset, int prot_flags,
				 int map_flags);
MICACCESSAPI int scif_unregister(scif_epd_t epd, off_t offset, size_t len);
MICACCESSAPI void *scif_mmap(void *addr, size_t len, int prot_flags, int map_flags, scif_epd_t epd,
			     off_t offset);
MICACCESSAPI int scif_munmap(void *addr, size_t len);

MICACCESSAPI int scif_readfrom(scif_epd_t epd, off_t loffset, size_t len, off_t roffset, int rma_flags);
MICACCESSAPI int scif_writeto(scif_epd_t epd, off_t loffset, size_t len, off_t roffset, int rma_flags);
MICACCESSAPI int scif_vreadfrom(scif_epd_t epd, void *addr, size_t len, off_t offset, int rma_flags);
MICACCESSAPI int scif_vwriteto(scif_epd_t epd, void *addr, size_t len, off_t offset, int rma_flags);

MICACCESSAPI int scif_fence_mark(scif_epd_t epd, int flags, int *mark);
MICACCESSAPI int scif_fence_wait(scif_epd_t epd, int mark);
MICACCESSAPI int scif_fence_signal(scif_epd_t epd, off_t loff, uint64_t lval, off_t roff, uint64_t rval,
				   int flags);

/* Returns the number of online nodes, this one included; fills at most len ids. */
MICACCESSAPI int scif_get_nodeIDs(uint16_t *nodes, int len, uint16_t *self);
MICACCESSAPI int scif_get_fd(scif_epd_t epd);
MICACCESSAPI int scif_poll(struct scif_pollepd *epds, unsigned int nepds, long timeout);

#ifdef __cplusplus
}
#endif

#endif
