/* Open, add, wait, close: the life of a device as its program sees it. */
#include "file.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "mic/barrier.h"

#define RING_FEATURES                                                                                        \
	((1ull << MIC_VIRTIO_F_EVENT_IDX) | (1ull << MIC_VIRTIO_F_INDIRECT_DESC) |                           \
	 (1ull << MIC_VIRTIO_F_VERSION_1))
#define DEVICE_BITS ((1ull << 24) - 1)

static int result(int rc)
{
	if (rc >= 0)
		return rc;
	errno = -rc;
	return -1;
}

static int watch(struct mic_vop *f, int fd, uint32_t events)
{
	struct epoll_event ev = {.events = events, .data.fd = fd};

	return epoll_ctl(f->epoll, EPOLL_CTL_ADD, fd, &ev) < 0 ? -errno : 0;
}

static int64_t now_ms(void)
{
	return (int64_t)(mic_now_ns() / 1000000);
}

/* What is left until `end`, for poll(2): never the -1 that means for ever. */
static int left_ms(int64_t end)
{
	int64_t left = end - now_ms();

	return left < 0 ? 0 : left > INT32_MAX ? INT32_MAX : (int)left;
}

int vop_sleep(struct mic_vop *f, int timeout_ms, int fd)
{
	struct pollfd p[2] = {{.fd = f->epoll, .events = POLLIN}, {.fd = fd, .events = POLLIN}};
	int rc = poll(p, fd >= 0 ? 2 : 1, timeout_ms);

	if (rc < 0)
		return -errno;
	if (rc && !p[0].revents)
		return 2;
	return rc ? (p[1].revents && fd >= 0 ? 3 : 1) : 0;
}

static void gone(struct mic_vop *f)
{
	f->removed = true;
	for (unsigned i = 0; i < MIC_MAX_VRINGS; i++)
		if (f->copy[i])
			mic_copy_remove(f->copy[i]);
}

int vop_serve(struct mic_vop *f, struct vop_line *answer)
{
	struct epoll_event ev[4];
	struct vop_line line;
	int n = epoll_wait(f->epoll, ev, 4, 0), rc;

	for (int i = 0; i < n; i++)
		if (f->added && ev[i].data.fd == f->kick_fd)
			f->news |= MIC_VOP_WORK;
	if (f->added && !f->removed)
		vop_handshake(f);
	while ((rc = vop_wire_recv(&f->wire, &line)) > 0) {
		if (vop_word(line.text, "op", "\"removed\"")) {
			static const char done[] = "{\"op\":\"released\"}\n";

			gone(f);
			(void)vop_wire_send(&f->wire, done, sizeof done - 1);
			return -ENODEV;
		}
		if (vop_word(line.text, "op", "\"counters\"")) {
			vop_tell_counters(f);
			continue;
		}
		if (answer) {
			*answer = line;
			return 1;
		}
		while (line.nfds)
			close(line.fds[--line.nfds]);
	}
	if (rc < 0)
		gone(f);
	return rc;
}

int vop_ask(struct mic_vop *f, const char *text, size_t len, struct vop_line *answer)
{
	int64_t end = now_ms() + REPLY_MS;
	int rc = vop_wire_send(&f->wire, text, len);

	while (!rc) {
		rc = vop_serve(f, answer);
		if (rc)
			break;
		int left = left_ms(end);

		if (!left)
			return -ENODEV;
		rc = vop_sleep(f, left, -1);
		if (rc == -EINTR || rc >= 0)
			rc = 0;
	}
	uint64_t code = 0;

	if (rc > 0 && vop_number(answer->text, "errno", &code) && code)
		return -(int)code;
	return rc > 0 ? 0 : rc;
}

/* --- open and close ----------------------------------------------------------------------------- */

static int greet(struct mic_vop *f)
{
	struct vop_line hello;
	int rc;

	while ((rc = vop_wire_recv(&f->wire, &hello)) == 0) {
		struct pollfd p = {.fd = f->wire.sock, .events = POLLIN};

		rc = poll(&p, 1, REPLY_MS);
		if (rc <= 0)
			return rc < 0 ? -errno : -ETIMEDOUT;
	}
	if (rc < 0)
		return rc;
	bool known = hello.nfds == MIC_FD_COUNT; /* else it is a host of another version */

	while (hello.nfds > MIC_FD_COUNT)
		close(hello.fds[--hello.nfds]);
	memcpy(f->card_fds, hello.fds, sizeof f->card_fds);
	f->card_nfds = hello.nfds;
	if (!known || !vop_number(hello.text, "page", &f->page))
		return -EPROTO;
	f->compat = vop_word(hello.text, "personality", "\"compat\"");
	f->bus = mic_bus_attach(f->card_fds);
	return f->bus ? 0 : -errno;
}

API struct mic_vop *mic_vop_open(const char *path)
{
	struct mic_vop *f = calloc(1, sizeof *f);

	if (!f)
		return NULL;
	f->wire.sock = f->kick_fd = f->owner_fd = f->vdev.line_fd = -1;
	f->epoll = epoll_create1(EPOLL_CLOEXEC);
	int rc = f->epoll < 0 ? -errno : vop_wire_connect(&f->wire, path);

	if (!rc)
		rc = greet(f);
	if (!rc)
		rc = watch(f, f->wire.sock, EPOLLIN);
	if (!rc)
		return f;
	mic_vop_close(f);
	errno = -rc;
	return NULL;
}

API void mic_vop_close(struct mic_vop *f)
{
	if (!f)
		return;
	for (unsigned i = 0; i < MIC_MAX_VRINGS; i++)
		if (f->copy[i])
			mic_copy_destroy(f->copy[i]);
	if (f->added) {
		mic_vdev_fini(&f->vdev);
		vop_wire_goodbye(&f->wire);
	}
	vop_wire_close(&f->wire);
	mic_bus_detach(f->bus);
	for (unsigned i = 0; i < f->card_nfds; i++)
		close(f->card_fds[i]);
	if (f->kick_fd >= 0)
		close(f->kick_fd);
	if (f->owner_fd >= 0)
		close(f->owner_fd);
	if (f->epoll >= 0)
		close(f->epoll);
	free(f);
}

API void mic_vop_dma(struct mic_vop *f, bool on)
{
	f->wants_dma = on;
}

/* --- ADD_DEVICE --------------------------------------------------------------------------------- */

static void hex(char *to, const uint8_t *from, unsigned len)
{
	for (unsigned i = 0; i < len; i++)
		sprintf(to + 2 * i, "%02x", from[i]);
	to[2 * len] = 0;
}

static int opened(struct mic_vop *f, const struct vop_line *slot)
{
	uint64_t off, num;

	uint64_t bounce[2] = {0, 0};

	f->kick_fd = slot->nfds ? slot->fds[0] : -1;
	f->owner_fd = slot->nfds > 1 ? slot->fds[1] : -1;
	if (slot->nfds < 1 || slot->nfds > 2 || !vop_number(slot->text, "off", &off) ||
	    !vop_number(slot->text, "num", &num) ||
	    vop_numbers(slot->text, "blocks", f->blocks, MIC_MAX_VRINGS) != f->shape.num_vq ||
	    (f->owner_fd >= 0 && vop_numbers(slot->text, "bounce", bounce, 2) != 2))
		return -EPROTO;
	unsigned body = (unsigned)sizeof(struct mic_device_desc) +
			(unsigned)sizeof(struct mic_vqconfig) * f->shape.num_vq + 2u * f->shape.feature_len +
			f->shape.config_len;
	uint64_t ctrl = f->page + off + ((body + 7u) & ~7u);

	f->num = (unsigned)num;
	int rc = mic_vdev_init(&f->vdev, f->bus, f->page + off, ctrl, f->kick_fd, -1, f->shape.num_vq);

	if (rc < 0)
		return rc;
	f->added = true;
	const struct mic_copy_setup setup = {.compat = f->compat,
					     .dma_timeout_ms = 5000,
					     .owner = f->owner_fd > 0 ? f->owner_fd : 0,
					     .bounce_off = bounce[0],
					     .bounce_addr = bounce[1]};

	for (unsigned i = 0; i < f->shape.num_vq; i++)
		if (!(f->copy[i] = mic_copy_create(&f->vdev, i, &setup)))
			return -errno;
	/* The line is shared and nobody reads it: each edge is one ring of the card's doorbell. */
	rc = watch(f, f->kick_fd, EPOLLIN | EPOLLET);
	if (!rc)
		vop_handshake(f); /* what the card asked before we looked */
	return rc;
}

int vop_add_block(struct mic_vop *f, const void *block)
{
	uint8_t bytes[MIC_MAX_DESC_BLK];
	char text[LINE_MAX], config[2 * 256 + 1];
	struct vop_line answer;

	if (f->added)
		return -EBUSY;
	if (mic_copy_from_user(&f->shape, block, sizeof f->shape) < 0)
		return -EFAULT;
	const struct mic_device_desc *d = &f->shape;
	unsigned features_at = (unsigned)(sizeof *d + sizeof(struct mic_vqconfig) * d->num_vq);
	unsigned size = features_at + 2u * d->feature_len + d->config_len;

	if (d->num_vq > MIC_MAX_VRINGS || ((size + 7u) & ~7u) > MIC_MAX_DESC_BLK || d->feature_len > 8)
		return -EINVAL;
	if (mic_copy_from_user(bytes, block, size) < 0)
		return -EFAULT;
	struct mic_vqconfig vq[MIC_MAX_VRINGS] = {{0}};

	memcpy(vq, bytes + sizeof *d, sizeof vq[0] * d->num_vq);
	for (unsigned i = 1; i < d->num_vq; i++)
		if (vq[i].num != vq[0].num)
			return -EINVAL; /* the host announces one size */
	f->offered = 0;
	memcpy(&f->offered, bytes + features_at, d->feature_len);
	hex(config, bytes + features_at + 2u * d->feature_len, d->config_len);
	int len = snprintf(text, sizeof text,
			   "{\"op\":\"add\",\"type\":%d,\"num_vq\":%u,\"num\":%u,\"features\":%llu,"
			   "\"feature_len\":%u,\"config\":\"%s\",\"dma\":%s}\n",
			   d->type, d->num_vq, vq[0].num, (unsigned long long)f->offered, d->feature_len,
			   config, f->wants_dma ? "true" : "false");
	int rc = vop_ask(f, text, (size_t)len, &answer);

	return rc < 0 ? rc : opened(f, &answer);
}

API int mic_vop_add(struct mic_vop *f, const struct mic_vop_device *device)
{
	uint8_t block[MIC_MAX_DESC_BLK] = {0};
	unsigned feature_len = f->compat ? 4 : 8;
	uint64_t features = device->features | RING_FEATURES;
	unsigned at =
		(unsigned)(sizeof(struct mic_device_desc) + sizeof(struct mic_vqconfig) * device->num_vq);

	if (f->compat)
		features &= DEVICE_BITS;
	if (device->type < 1 || device->type > 127 || device->num_vq > MIC_MAX_VRINGS ||
	    device->num > MIC_MAX_VRING_ENTRIES || device->config_len > sizeof block - at - 2 * feature_len)
		return result(-EINVAL);
	struct mic_device_desc d = {.type = (int8_t)device->type,
				    .num_vq = (uint8_t)device->num_vq,
				    .feature_len = (uint8_t)feature_len,
				    .config_len = (uint8_t)device->config_len};
	struct mic_vqconfig vq = {.num = (uint16_t)device->num};

	memcpy(block, &d, sizeof d);
	for (unsigned i = 0; i < device->num_vq; i++)
		memcpy(block + sizeof d + i * sizeof vq, &vq, sizeof vq);
	memcpy(block + at, &features, feature_len);
	if (device->config_len)
		memcpy(block + at + 2 * feature_len, device->config, device->config_len);
	return result(vop_add_block(f, block));
}

API uint64_t mic_vop_features(struct mic_vop *f)
{
	return f->accepted;
}

API bool mic_vop_driver_ok(struct mic_vop *f)
{
	return f->added && !f->removed && mic_vdev_driver_ok(&f->vdev);
}

/* --- waiting ------------------------------------------------------------------------------------- */

static int take_news(struct mic_vop *f)
{
	int news = (int)f->news;

	f->news = 0;
	return news;
}

/* Is there anything in a ring? Asks for kicks first, so that what comes later rings. */
static bool has_work(struct mic_vop *f)
{
	bool any = false;

	for (unsigned i = 0; i < f->shape.num_vq; i++)
		any |= mic_vq_enable_kick(&f->vdev.vq[i]);
	return any;
}

API int mic_vop_wait(struct mic_vop *f, int timeout_ms, int fd)
{
	int64_t end = now_ms() + timeout_ms;

	if (!f->added)
		return result(-EINVAL);
	for (;;) {
		int rc = vop_serve(f, NULL);

		if (f->removed)
			return result(-ENODEV);
		if (rc < 0)
			return result(rc);
		if (mic_vdev_driver_ok(&f->vdev) != f->driver_ok) {
			f->driver_ok = !f->driver_ok;
			f->news |= MIC_VOP_DRIVER;
		}
		if (has_work(f))
			f->news |= MIC_VOP_WORK;
		else
			f->news &= ~(unsigned)MIC_VOP_WORK; /* the doorbell was a hand-shake's */
		int left = f->news ? 0 : timeout_ms < 0 ? -1 : left_ms(end);

		rc = vop_sleep(f, left, fd);
		if (rc < 0)
			return f->news ? take_news(f) : result(rc);
		if (rc & 2)
			return take_news(f) | MIC_VOP_OTHER;
		if (f->news || (rc == 0 && !left))
			return take_news(f);
	}
}

API int mic_vop_fd(struct mic_vop *f)
{
	return f->epoll;
}

/* --- configuration and the real calls -------------------------------------------------------------- */

API int mic_vop_set_config(struct mic_vop *f, const void *config)
{
	char text[LINE_MAX], words[2 * 256 + 1];
	struct vop_line answer;

	if (!f->added || f->removed)
		return result(f->added ? -ENODEV : -EINVAL);
	hex(words, config, f->shape.config_len);
	int len = snprintf(text, sizeof text, "{\"op\":\"config\",\"config\":\"%s\"}\n", words);
	int rc = vop_ask(f, text, (size_t)len, &answer);

	return rc < 0 ? result(rc) : vop_word(answer.text, "acked", "true");
}

static int copy_desc(struct mic_vop *f, void *arg)
{
	struct mic_copy_desc request;

	if (!f->added || f->removed)
		return f->added ? -ENODEV : -EINVAL;
	int rc = vop_serve(f, NULL);

	if (rc < 0)
		return rc;
	if (mic_copy_from_user(&request, arg, sizeof request) < 0)
		return -EFAULT;
	if (request.vr_idx >= f->shape.num_vq)
		return -EINVAL;
	return mic_copy_desc_run(f->copy[request.vr_idx], arg);
}

static int config_change(struct mic_vop *f, const void *arg)
{
	uint8_t config[UINT8_MAX];

	if (f->added && mic_copy_from_user(config, arg, f->shape.config_len) < 0)
		return result(-EFAULT);
	return mic_vop_set_config(f, config);
}

API int mic_vop_ioctl(struct mic_vop *f, unsigned long command, void *arg)
{
	switch (command) {
	case MIC_VIRTIO_ADD_DEVICE:
		return result(vop_add_block(f, arg));
	case MIC_VIRTIO_COPY_DESC:
		return result(copy_desc(f, arg));
	case MIC_VIRTIO_CONFIG_CHANGE:
		return config_change(f, arg);
	default:
		return result(-ENOTTY);
	}
}
