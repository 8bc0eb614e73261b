// SPDX-License-Identifier: GPL-2.0-only
/*
 * A resuming session: takes the stream apart as it comes.
 *
 * Bytes are copied from the user straight into the record that is arriving, in
 * writes of any length. A record is checked when it is whole; bulk state goes
 * into the device at once, registers and configuration are put in force by
 * ferrydev_loader_finish(), which RESUMING -> STOP calls: the one place where
 * loaded data is judged. Lengths are claims until they are checked; memory is
 * one record, what the device itself may have, and one configuration.
 *
 * The record buffer is under the data file's lock, the rest under fdev->lock.
 */

#include <linux/bitmap.h>
#include <linux/slab.h>
#include <linux/unaligned.h>

#include "ferrydev.h"

struct ferrydev_loader {
	u8 *record;
	u32 have;		/* bytes of the record that is arriving */
	u64 sequence;
	int failed;		/* the first error; the session is spoilt */
	bool ended;
	bool has_regs;
	struct ferrydev_regs regs;
	unsigned long *received;
	u64 blocks;

	struct ferrydev_config *config;
	/* The configuration that is arriving. */
	bool arriving;
	u32 generation;
	u64 arriving_bytes;
	u64 arriving_at;
	void *arriving_data;
};

struct ferrydev_loader *ferrydev_loader_new(void)
{
	struct ferrydev_loader *loader = kzalloc_obj(*loader, GFP_KERNEL_ACCOUNT);

	if (!loader)
		return NULL;
	loader->record = kvmalloc(FERRYDEV_RECORD_BYTES_MAX, GFP_KERNEL_ACCOUNT);
	if (!loader->record) {
		kfree(loader);
		return NULL;
	}
	return loader;
}

static void drop_arriving(struct ferrydev_loader *loader)
{
	kvfree(loader->arriving_data);
	loader->arriving_data = NULL;
	loader->arriving = false;
}

/* As if nothing had come. */
void ferrydev_loader_restart(struct ferrydev_loader *loader)
{
	drop_arriving(loader);
	ferrydev_config_put(loader->config);
	loader->config = NULL;
	loader->have = 0;
	loader->sequence = 0;
	loader->failed = 0;
	loader->ended = false;
	loader->has_regs = false;
	if (loader->received)
		bitmap_zero(loader->received, loader->blocks);
}

void ferrydev_loader_free(struct ferrydev_loader *loader)
{
	if (!loader)
		return;
	ferrydev_loader_restart(loader);
	kvfree(loader->received);
	kvfree(loader->record);
	kfree(loader);
}

int ferrydev_loader_begin(struct ferrydev_loader *loader, struct ferrydev *fdev)
{
	size_t longs;

	loader->blocks = ferrydev_blocks(&fdev->geometry);
	longs = max_t(size_t, BITS_TO_LONGS(loader->blocks), 1);
	loader->received = kvcalloc(longs, sizeof(long), GFP_KERNEL_ACCOUNT);
	return loader->received ? 0 : -ENOMEM;
}

size_t ferrydev_loader_room(struct ferrydev_loader *loader, u8 **to)
{
	u32 whole = FERRYDEV_HEADER_BYTES;

	/* A header that is there was checked by ferrydev_loader_take(). */
	if (loader->have >= FERRYDEV_HEADER_BYTES)
		whole += get_unaligned_le32(loader->record + 24);
	*to = loader->record + loader->have;
	return whole - loader->have;
}

static int take_header(struct ferrydev *fdev, const struct ferrydev_record *record,
		       const u8 *payload)
{
	u8 ours[FERRYDEV_GEOMETRY_BYTES];

	ferrydev_geometry_encode(ours, &fdev->geometry);
	if (record->value != FERRYDEV_STREAM_VERSION ||
	    record->payload_bytes != sizeof(ours) || memcmp(payload, ours, sizeof(ours))) {
		dev_dbg(fdev->vdev.dev, "state of another device\n");
		return -EINVAL;
	}
	return 0;
}

static void config_whole(struct ferrydev_loader *loader)
{
	if (loader->arriving_at != loader->arriving_bytes)
		return;
	loader->config = ferrydev_config_new(loader->generation, loader->arriving_bytes,
					     loader->arriving_data);
	loader->arriving_data = NULL;
	loader->arriving = false;
}

static int take_config(struct ferrydev_loader *loader, struct ferrydev *fdev,
		       const struct ferrydev_record *record, const u8 *payload)
{
	u64 bytes_max = fdev->geometry.config_kib_max * 1024ULL;

	if (record->payload_bytes != sizeof(u32) || record->value > bytes_max ||
	    record->value % 1024)
		return -EINVAL;
	/* The older one is void. */
	ferrydev_config_put(loader->config);
	loader->config = NULL;
	drop_arriving(loader);
	if (record->value) {
		loader->arriving_data = kvmalloc(record->value, GFP_KERNEL_ACCOUNT);
		if (!loader->arriving_data)
			return -ENOMEM;
	}
	loader->generation = get_unaligned_le32(payload);
	loader->arriving_bytes = record->value;
	loader->arriving_at = 0;
	loader->arriving = true;
	config_whole(loader);
	return 0;
}

static int take_config_data(struct ferrydev_loader *loader,
			    const struct ferrydev_record *record, const u8 *payload)
{
	u64 room = loader->arriving_bytes - loader->arriving_at;

	if (!loader->arriving || record->value != loader->arriving_at ||
	    !record->payload_bytes || record->payload_bytes > room)
		return -EINVAL;
	memcpy(loader->arriving_data + loader->arriving_at, payload, record->payload_bytes);
	loader->arriving_at += record->payload_bytes;
	config_whole(loader);
	return 0;
}

static int take_bulk(struct ferrydev_loader *loader, struct ferrydev *fdev,
		     const struct ferrydev_record *record, const u8 *payload)
{
	u64 groups = DIV_ROUND_UP_ULL(loader->blocks, FERRYDEV_GROUP_BLOCKS);
	u32 rest = record->payload_bytes;
	unsigned int bit;
	u64 block;
	u32 len;
	int rc;

	if (record->value >= groups || !record->arg)
		return -EINVAL;
	for (bit = 0; bit < FERRYDEV_GROUP_BLOCKS; bit++) {
		if (!(record->arg & BIT(bit)))
			continue;
		block = record->value * FERRYDEV_GROUP_BLOCKS + bit;
		if (block >= loader->blocks)
			return -EINVAL;
		len = ferrydev_block_bytes(&fdev->geometry, block);
		if (len > rest)
			return -EINVAL;
		rc = ferrydev_block_store(fdev, block, payload);
		if (rc)
			return rc;
		__set_bit(block, loader->received);
		payload += len;
		rest -= len;
	}
	return rest ? -EINVAL : 0;
}

static int take_record(struct ferrydev_loader *loader, struct ferrydev *fdev,
		       const struct ferrydev_record *record)
{
	const u8 *payload = loader->record + FERRYDEV_HEADER_BYTES;
	bool is_header = record->kind == FERRYDEV_RECORD_HEADER;
	bool is_end = record->kind == FERRYDEV_RECORD_END;
	int rc;

	if (!ferrydev_record_intact(loader->record, record))
		return -EINVAL;
	/* A second stream is as good as the first. */
	if (is_header && ferrydev_has(fdev, FERRYDEV_BREAK_X7))
		ferrydev_loader_restart(loader);
	if (record->sequence != loader->sequence)
		return -EINVAL;
	/* HEADER is first and only first; only END follows REGS; nothing END. */
	if (!loader->sequence != is_header || loader->has_regs != is_end || loader->ended)
		return -EINVAL;

	switch (record->kind) {
	case FERRYDEV_RECORD_HEADER:
		return take_header(fdev, record, payload);
	case FERRYDEV_RECORD_CONFIG:
		return take_config(loader, fdev, record, payload);
	case FERRYDEV_RECORD_CONFIG_DATA:
		return take_config_data(loader, record, payload);
	case FERRYDEV_RECORD_BULK:
		return take_bulk(loader, fdev, record, payload);
	case FERRYDEV_RECORD_REGS:
		if (record->payload_bytes != FERRYDEV_REGS_BYTES)
			return -EINVAL;
		rc = ferrydev_regs_decode(payload, &fdev->geometry, &loader->regs);
		loader->has_regs = !rc;
		return rc;
	case FERRYDEV_RECORD_END:
		if (record->value != loader->sequence || record->payload_bytes)
			return -EINVAL;
		loader->ended = true;
		return 0;
	default:
		return -EINVAL;
	}
}

/* @len bytes came where ferrydev_loader_room() said. */
int ferrydev_loader_take(struct ferrydev_loader *loader, struct ferrydev *fdev, size_t len)
{
	struct ferrydev_record record;
	int rc;

	if (loader->failed)
		return loader->failed;
	loader->have += len;
	if (loader->have < FERRYDEV_HEADER_BYTES)
		return 0;
	rc = ferrydev_record_parse(loader->record, &record);
	if (!rc && loader->have < FERRYDEV_HEADER_BYTES + record.payload_bytes)
		return 0;
	if (!rc)
		rc = take_record(loader, fdev, &record);
	loader->have = 0;
	loader->sequence++;
	if (rc) {
		dev_dbg(fdev->vdev.dev, "record %llu refused: %d\n",
			loader->sequence - 1, rc);
		loader->failed = rc;
	}
	return rc;
}

/* Validates the whole and puts it in force. */
int ferrydev_loader_finish(struct ferrydev_loader *loader, struct ferrydev *fdev)
{
	if (loader->failed)
		return loader->failed;
	if (loader->have || !loader->ended || loader->arriving || !loader->config ||
	    !bitmap_full(loader->received, loader->blocks)) {
		dev_dbg(fdev->vdev.dev, "the state is incomplete\n");
		return -EINVAL;
	}
	fdev->state.regs = loader->regs;
	ferrydev_state_reconfigure(fdev, loader->config);
	loader->config = NULL;
	return 0;
}
