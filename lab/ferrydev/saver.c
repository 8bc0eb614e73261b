// SPDX-License-Identifier: GPL-2.0-only
/*
 * A saving session: what is on the stream, in which order, how it is counted.
 *
 *   guest reconfigures -> queue: [header] [configuration] [blocks] [configuration]
 *   guest fills --------> changed +
 *   session begins -----> unsent  +- read when the queue is empty
 *                                    STOP_COPY: the rest, REGS, END
 *   reader <-- out: the rest of one record
 *
 * Records are made one at a time as they are read, so a session takes the memory
 * of one record whatever the size of the state; and since their lengths are
 * known before their bytes, initial_bytes falls to exactly zero as the stream is
 * read. Blocks are read as they are when their record is made.
 *
 * What is planned is under fdev->lock, the record that is being read (out*)
 * under the data file's lock; who needs both takes both.
 */

#include <linux/bitmap.h>
#include <linux/ktime.h>
#include <linux/slab.h>
#include <linux/unaligned.h>

#include "ferrydev.h"

/* How planned bytes are counted in PRE_COPY. */
enum byte_class {
	INITIAL,
	DIRTY,
	UNCOUNTED,		/* for quirks */
};

enum item_kind {
	ITEM_HEADER,
	ITEM_CONFIG,
	ITEM_BLOCKS,		/* those of saver->planned */
};

struct item {
	enum item_kind kind;
	enum byte_class class;
	struct ferrydev_config *config;
	bool begun;		/* its CONFIG record is made */
	u64 next;		/* offset to go on from */
};

enum stage {
	STAGE_PRECOPY,
	STAGE_REGS,		/* the rest, then what is named */
	STAGE_END,
	STAGE_DONE,
};

/* A header, a configuration that was begun, blocks, a configuration. */
#define QUEUE_MAX	4

struct ferrydev_saver {
	const struct ferrydev_geometry *geometry;
	struct item queue[QUEUE_MAX];
	unsigned int queued;
	u64 blocks;
	u64 precopy_blocks;	/* blocks below this are read in PRE_COPY */
	unsigned long *unsent;	/* not carried since this last began from zero */
	unsigned long *changed;	/* written since they were carried */
	unsigned long *planned;
	enum stage stage;
	bool reconfigured;	/* and nothing of it planned yet */
	u64 reconfigured_ns;
	bool reinit_edge;	/* REINIT happened and was not reported yet */
	bool had_reinit;
	bool initial_read;	/* for break-R6 */
	bool corrupted;
	u64 peeks;
	u64 infos;
	u64 sequence;

	u8 *out;
	u32 out_bytes;
	u32 out_at;
	enum byte_class out_class;
};

#define STREAM_HEADER_BYTES	(FERRYDEV_HEADER_BYTES + FERRYDEV_GEOMETRY_BYTES)
#define REGS_RECORD_BYTES	(FERRYDEV_HEADER_BYTES + FERRYDEV_REGS_BYTES)
#define TAIL_BYTES		(REGS_RECORD_BYTES + FERRYDEV_HEADER_BYTES)

/* Stream bytes of a configuration, or of the rest of one. */
static u64 config_bytes(u64 bytes, bool begun, u64 next)
{
	u64 rest = bytes - next;

	rest += DIV_ROUND_UP_ULL(rest, FERRYDEV_PAYLOAD_BYTES_MAX) * FERRYDEV_HEADER_BYTES;
	return begun ? rest : rest + FERRYDEV_HEADER_BYTES + sizeof(u32);
}

/* Stream bytes of the blocks below @limit that are in @a or, if given, @b. */
static u64 blocks_bytes(const struct ferrydev_geometry *geometry, const unsigned long *a,
			const unsigned long *b, u64 limit)
{
	u64 i, lane, count = 0, groups = 0, last = ferrydev_blocks(geometry) - 1;
	unsigned long word;
	u64 bytes;

	for (i = 0; i < BITS_TO_LONGS(limit); i++) {
		word = a[i] | (b ? b[i] : 0);
		if ((i + 1) * BITS_PER_LONG > limit)
			word &= BITMAP_LAST_WORD_MASK(limit);
		count += hweight_long(word);
		for (lane = 0; lane < BITS_PER_LONG; lane += FERRYDEV_GROUP_BLOCKS)
			groups += (u16)(word >> lane) != 0;
	}
	bytes = count * FERRYDEV_BLOCK_BYTES + groups * FERRYDEV_HEADER_BYTES;
	if (last < limit && (test_bit(last, a) || (b && test_bit(last, b))))
		bytes -= FERRYDEV_BLOCK_BYTES - ferrydev_block_bytes(geometry, last);
	return bytes;
}

/* The stream of a session that carries everything once. */
u64 ferrydev_whole_stream_bytes(struct ferrydev *fdev)
{
	u64 bulk = fdev->geometry.bulk_bytes;
	u64 groups = DIV_ROUND_UP_ULL(ferrydev_blocks(&fdev->geometry), FERRYDEV_GROUP_BLOCKS);

	return STREAM_HEADER_BYTES + config_bytes(fdev->state.config->bytes, false, 0) +
	       bulk + groups * FERRYDEV_HEADER_BYTES + TAIL_BYTES;
}

/* Takes the memory; what is in it follows with ferrydev_saver_begin(). */
struct ferrydev_saver *ferrydev_saver_new(struct ferrydev *fdev)
{
	u64 blocks = ferrydev_blocks(&fdev->geometry);
	size_t longs = max_t(size_t, BITS_TO_LONGS(blocks), 1);
	struct ferrydev_saver *saver = kzalloc_obj(*saver, GFP_KERNEL_ACCOUNT);

	if (!saver)
		return NULL;
	saver->geometry = &fdev->geometry;
	saver->blocks = blocks;
	saver->unsent = kvcalloc(longs, sizeof(long), GFP_KERNEL_ACCOUNT);
	saver->changed = kvcalloc(longs, sizeof(long), GFP_KERNEL_ACCOUNT);
	saver->planned = kvcalloc(longs, sizeof(long), GFP_KERNEL_ACCOUNT);
	saver->out = kvmalloc(FERRYDEV_RECORD_BYTES_MAX, GFP_KERNEL_ACCOUNT);
	if (!saver->unsent || !saver->changed || !saver->planned || !saver->out) {
		ferrydev_saver_free(saver);
		return NULL;
	}
	return saver;
}

static void drop_item(struct ferrydev_saver *saver, unsigned int at)
{
	ferrydev_config_put(saver->queue[at].config);
	saver->queued--;
	memmove(&saver->queue[at], &saver->queue[at + 1],
		(saver->queued - at) * sizeof(saver->queue[0]));
}

void ferrydev_saver_free(struct ferrydev_saver *saver)
{
	if (!saver)
		return;
	while (saver->queued)
		drop_item(saver, 0);
	kvfree(saver->out);
	kvfree(saver->planned);
	kvfree(saver->changed);
	kvfree(saver->unsent);
	kfree(saver);
}

static void push_item(struct ferrydev_saver *saver, enum item_kind kind,
		      enum byte_class class, struct ferrydev_config *config)
{
	struct item *item = &saver->queue[saver->queued];

	if (WARN_ON_ONCE(saver->queued == QUEUE_MAX)) {
		ferrydev_config_put(config);
		return;
	}
	*item = (struct item){ .kind = kind, .class = class, .config = config };
	saver->queued++;
}

static void push_config(struct ferrydev_saver *saver, struct ferrydev *fdev,
			enum byte_class class)
{
	push_item(saver, ITEM_CONFIG, class, ferrydev_config_get(fdev->state.config));
}

/* Drops configurations that were not begun: a newer one replaces them. */
static void drop_stale_configs(struct ferrydev_saver *saver, bool dirty_only)
{
	unsigned int i = 0;

	while (i < saver->queued) {
		struct item *item = &saver->queue[i];

		if (item->kind == ITEM_CONFIG && !item->begun &&
		    (!dirty_only || item->class == DIRTY))
			drop_item(saver, i);
		else
			i++;
	}
}

/* A session begins, in PRE_COPY(_P2P) or in STOP_COPY. */
void ferrydev_saver_begin(struct ferrydev_saver *saver, struct ferrydev *fdev, bool precopy)
{
	enum byte_class class = precopy ? INITIAL : DIRTY;

	if (precopy && ferrydev_has(fdev, FERRYDEV_BREAK_P4_ZERO))
		class = UNCOUNTED;
	saver->stage = precopy ? STAGE_PRECOPY : STAGE_REGS;
	saver->precopy_blocks = ferrydev_first_stop_only(saver->geometry);
	if (ferrydev_has(fdev, FERRYDEV_NO_DIRTY_BYTES))
		saver->precopy_blocks = 0;
	bitmap_fill(saver->unsent, saver->blocks);
	push_item(saver, ITEM_HEADER, class, NULL);
	push_config(saver, fdev, class);
}

/* For break-F13. */
void ferrydev_saver_rebegin(struct ferrydev_saver *saver, struct ferrydev *fdev)
{
	while (saver->queued)
		drop_item(saver, 0);
	bitmap_zero(saver->changed, saver->blocks);
	bitmap_zero(saver->planned, saver->blocks);
	saver->out_at = saver->out_bytes;
	saver->sequence = 0;
	ferrydev_saver_begin(saver, fdev, true);
}

/* A block was written. One that is still to be made into a record is no change. */
void ferrydev_saver_note_fill(struct ferrydev_saver *saver, u64 block)
{
	if (!test_bit(block, saver->unsent) && !test_bit(block, saver->planned))
		__set_bit(block, saver->changed);
}

void ferrydev_saver_note_config(struct ferrydev_saver *saver)
{
	if (!saver->reconfigured)
		saver->reconfigured_ns = ktime_get_ns();
	saver->reconfigured = true;
}

/* The device was reset under a session that goes on (reset-keeps-state). */
void ferrydev_saver_restart(struct ferrydev_saver *saver, struct ferrydev *fdev)
{
	u64 block;

	ferrydev_saver_note_config(saver);
	for (block = 0; block < saver->blocks; block++)
		ferrydev_saver_note_fill(saver, block);
}

/* Unread bytes of one class that are planned. */
static u64 planned_bytes(struct ferrydev_saver *saver, enum byte_class class)
{
	u64 bytes = saver->out_class == class ? saver->out_bytes - saver->out_at : 0;
	unsigned int i;

	for (i = 0; i < saver->queued; i++) {
		const struct item *item = &saver->queue[i];

		if (item->class != class)
			continue;
		switch (item->kind) {
		case ITEM_HEADER:
			bytes += STREAM_HEADER_BYTES;
			break;
		case ITEM_CONFIG:
			bytes += config_bytes(item->config->bytes, item->begun, item->next);
			break;
		case ITEM_BLOCKS:
			bytes += blocks_bytes(saver->geometry, saver->planned, NULL,
					      saver->blocks);
			break;
		}
	}
	return bytes;
}

static u64 dirty_bytes(struct ferrydev_saver *saver, u64 initial_bytes)
{
	if (!saver->precopy_blocks)
		return 0;
	/* Bulk state counts as dirty once the initial data is read. */
	return planned_bytes(saver, DIRTY) +
	       blocks_bytes(saver->geometry, saver->changed,
			    initial_bytes ? NULL : saver->unsent, saver->precopy_blocks);
}

static void add_bits(unsigned long *to, const unsigned long *from, u64 bits)
{
	bitmap_or(to, to, from, bits);
}

/*
 * New initial data: the one place that knows what becomes of unread data.
 *
 * By default all that was counted as unread is flushed: it is read first, and
 * counts as initial. With reinit-drops-unread it is dropped: its blocks are
 * still to be carried, but later, and count from zero. A record that is being
 * read must be read to its end either way.
 */
static void reinit(struct ferrydev_saver *saver, struct ferrydev *fdev)
{
	bool drop = ferrydev_has(fdev, FERRYDEV_REINIT_DROPS_UNREAD);
	enum byte_class class = INITIAL;
	u64 initial_bytes = planned_bytes(saver, INITIAL);
	u64 block;
	unsigned int i = 0;

	if (ferrydev_has(fdev, FERRYDEV_BREAK_R7))
		class = UNCOUNTED;
	saver->out_class = class;
	drop_stale_configs(saver, false);
	while (i < saver->queued) {
		struct item *item = &saver->queue[i];

		if (item->kind == ITEM_BLOCKS || (item->kind == ITEM_CONFIG && drop)) {
			drop_item(saver, i);
		} else {
			item->class = INITIAL;
			i++;
		}
	}

	if (drop) {
		add_bits(saver->unsent, saver->planned, saver->blocks);
		add_bits(saver->unsent, saver->changed, saver->blocks);
		bitmap_zero(saver->planned, saver->blocks);
		bitmap_zero(saver->changed, saver->blocks);
	} else {
		for (block = 0; block < saver->precopy_blocks; block++) {
			if (!test_bit(block, saver->changed) &&
			    !(test_bit(block, saver->unsent) && !initial_bytes))
				continue;
			__set_bit(block, saver->planned);
			__clear_bit(block, saver->changed);
			__clear_bit(block, saver->unsent);
		}
		if (!bitmap_empty(saver->planned, saver->blocks))
			push_item(saver, ITEM_BLOCKS, class, NULL);
	}
	push_config(saver, fdev, INITIAL);
	saver->reconfigured = false;
	saver->had_reinit = true;
	saver->reinit_edge = true;
}

static bool may_reinit(const struct ferrydev_saver *saver, const struct ferrydev *fdev)
{
	/* Initial data that was read once stays read. */
	if (ferrydev_has(fdev, FERRYDEV_BREAK_R6) && saver->initial_read && !saver->had_reinit)
		return false;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_R5) && saver->had_reinit)
		return false;
	if (ferrydev_has(fdev, FERRYDEV_NO_REINIT))
		return false;
	return fdev->vdev.precopy_info_v2 || ferrydev_has(fdev, FERRYDEV_BREAK_R3);
}

/* The device notices the new configuration now. */
static bool reinit_is_due(const struct ferrydev_saver *saver, const struct ferrydev *fdev)
{
	u64 late_ns = 0;

	if (fdev->mig_state == VFIO_DEVICE_STATE_PRE_COPY_P2P &&
	    ferrydev_has(fdev, FERRYDEV_NO_REINIT_IN_P2P))
		return false;
	if (ferrydev_has(fdev, FERRYDEV_REINIT_LATE))
		late_ns = (u64)fdev->quirks.arg[FERRYDEV_REINIT_LATE] * NSEC_PER_MSEC;
	return ktime_get_ns() - saver->reconfigured_ns >= late_ns;
}

/* Takes notice, in PRE_COPY, of what the guest did. */
static void plan(struct ferrydev_saver *saver, struct ferrydev *fdev)
{
	if (saver->stage != STAGE_PRECOPY || !saver->reconfigured)
		return;
	if (may_reinit(saver, fdev)) {
		if (reinit_is_due(saver, fdev))
			reinit(saver, fdev);
	} else if (saver->precopy_blocks) {
		/* Initial data does not grow in v1, so this is ordinary change. */
		drop_stale_configs(saver, true);
		push_config(saver, fdev, DIRTY);
		saver->reconfigured = false;
	}
}

/* Plans all change as one piece, as mlx5 starts its next SAVE. */
static void plan_increment(struct ferrydev_saver *saver)
{
	u64 block;

	for (block = 0; block < saver->precopy_blocks; block++) {
		if (!test_bit(block, saver->changed) && !test_bit(block, saver->unsent))
			continue;
		__set_bit(block, saver->planned);
		__clear_bit(block, saver->changed);
		__clear_bit(block, saver->unsent);
	}
	if (!bitmap_empty(saver->planned, saver->blocks))
		push_item(saver, ITEM_BLOCKS, DIRTY, NULL);
}

/* PRECOPY_INFO. It plans what is read next, so it is more than a query. */
void ferrydev_saver_info(struct ferrydev_saver *saver, struct ferrydev *fdev,
			 struct ferrydev_precopy *info)
{
	plan(saver, fdev);
	if (ferrydev_has(fdev, FERRYDEV_INFO_DRIVES_DEVICE) && !saver->queued &&
	    saver->out_at == saver->out_bytes &&
	    fdev->mig_state == VFIO_DEVICE_STATE_PRE_COPY)
		plan_increment(saver);

	info->initial_bytes = planned_bytes(saver, INITIAL);
	info->dirty_bytes = dirty_bytes(saver, info->initial_bytes +
						planned_bytes(saver, UNCOUNTED));
	info->reinit = saver->reinit_edge;
	if (ferrydev_has(fdev, FERRYDEV_STICKY_REINIT) && saver->had_reinit &&
	    info->initial_bytes)
		info->reinit = true;
	saver->reinit_edge = false;
	saver->initial_read |= !info->initial_bytes;
	saver->infos++;

	if (ferrydev_has(fdev, FERRYDEV_HIDDEN_SAVE_FAILURE) && !info->initial_bytes)
		info->dirty_bytes = 0;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_P4) && !fdev->vdev.precopy_info_v2)
		info->initial_bytes += saver->infos * FERRYDEV_BLOCK_BYTES;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_P5) && saver->infos == 1)
		info->dirty_bytes += FERRYDEV_BLOCK_BYTES;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_R4) && info->reinit)
		info->dirty_bytes += FERRYDEV_BLOCK_BYTES;
}

bool ferrydev_saver_initial_left(struct ferrydev_saver *saver)
{
	return planned_bytes(saver, INITIAL);
}

/* The device is stopped: what was not read yet, then what only STOP_COPY reads. */
void ferrydev_saver_stop_copy(struct ferrydev_saver *saver, struct ferrydev *fdev)
{
	bool again = ferrydev_has(fdev, FERRYDEV_HIDDEN_SAVE_FAILURE);

	if (saver->stage != STAGE_PRECOPY)
		return;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_S4)) {
		while (saver->queued)
			drop_item(saver, 0);
		bitmap_zero(saver->planned, saver->blocks);
		saver->out_at = saver->out_bytes;
	}
	if (again)
		bitmap_fill(saver->unsent, saver->blocks);
	if (again || saver->reconfigured) {
		drop_stale_configs(saver, false);
		push_config(saver, fdev, DIRTY);
	}
	saver->reconfigured = false;
	saver->reinit_edge = false;
	saver->stage = STAGE_REGS;
}

/* Bytes until the end of STOP_COPY, unread PRE_COPY data included. */
u64 ferrydev_saver_remaining(struct ferrydev_saver *saver, struct ferrydev *fdev)
{
	u64 bytes = planned_bytes(saver, INITIAL) + planned_bytes(saver, DIRTY) +
		    planned_bytes(saver, UNCOUNTED);

	if (saver->reconfigured)
		bytes += config_bytes(fdev->state.config->bytes, false, 0);
	bytes += blocks_bytes(saver->geometry, saver->unsent, saver->changed, saver->blocks);
	if (saver->stage < STAGE_END)
		bytes += REGS_RECORD_BYTES;
	if (saver->stage < STAGE_DONE)
		bytes += FERRYDEV_HEADER_BYTES;
	return bytes;
}

static void seal(struct ferrydev_saver *saver, enum ferrydev_record_kind kind, u16 arg,
		 u64 value, u32 payload_bytes, enum byte_class class)
{
	ferrydev_record_seal(saver->out, kind, arg, saver->sequence++, value, payload_bytes);
	saver->out_bytes = FERRYDEV_HEADER_BYTES + payload_bytes;
	saver->out_at = 0;
	saver->out_class = class;
}

static void make_group(struct ferrydev_saver *saver, struct ferrydev *fdev, u64 group,
		       u16 mask, enum byte_class class)
{
	u8 *payload = saver->out + FERRYDEV_HEADER_BYTES;
	u64 block = group * FERRYDEV_GROUP_BLOCKS;
	unsigned int bit;
	u32 used = 0;

	for (bit = 0; bit < FERRYDEV_GROUP_BLOCKS; bit++)
		if (mask & BIT(bit))
			used += ferrydev_block_read(fdev, block + bit, payload + used);
	if (ferrydev_has(fdev, FERRYDEV_CORRUPT_SAVE) && !saver->corrupted) {
		payload[0] ^= 1;
		saver->corrupted = true;
	}
	seal(saver, FERRYDEV_RECORD_BULK, mask, group, used, class);
}

/* Takes the group of @block out of a set; answers which of its blocks were there. */
static u16 take_group(unsigned long *set, u64 group, u64 limit)
{
	u64 block = group * FERRYDEV_GROUP_BLOCKS;
	unsigned int bit;
	u16 mask = 0;

	for (bit = 0; bit < FERRYDEV_GROUP_BLOCKS && block + bit < limit; bit++)
		if (__test_and_clear_bit(block + bit, set))
			mask |= BIT(bit);
	return mask;
}

/* A record of what is not planned. */
static bool make_blocks(struct ferrydev_saver *saver, struct ferrydev *fdev, u64 limit)
{
	u64 block = min(find_first_bit(saver->unsent, limit),
			find_first_bit(saver->changed, limit));
	u64 group = block / FERRYDEV_GROUP_BLOCKS;
	u16 mask;

	if (block >= limit)
		return false;
	mask = take_group(saver->unsent, group, limit);
	mask |= take_group(saver->changed, group, limit);
	make_group(saver, fdev, group, mask, DIRTY);
	return true;
}

static void make_config(struct ferrydev_saver *saver, struct item *item)
{
	u8 *payload = saver->out + FERRYDEV_HEADER_BYTES;
	u64 offset = item->next;
	u32 len;

	if (!item->begun) {
		item->begun = true;
		put_unaligned_le32(item->config->generation, payload);
		seal(saver, FERRYDEV_RECORD_CONFIG, 0, item->config->bytes, sizeof(u32),
		     item->class);
		return;
	}
	len = min_t(u64, item->config->bytes - offset, FERRYDEV_PAYLOAD_BYTES_MAX);
	ferrydev_config_read(item->config, offset, payload, len);
	item->next += len;
	seal(saver, FERRYDEV_RECORD_CONFIG_DATA, 0, offset, len, item->class);
}

static bool make_planned(struct ferrydev_saver *saver, struct ferrydev *fdev)
{
	while (saver->queued) {
		struct item *item = &saver->queue[0];
		u64 block;

		switch (item->kind) {
		case ITEM_HEADER:
			ferrydev_geometry_encode(saver->out + FERRYDEV_HEADER_BYTES,
						 saver->geometry);
			seal(saver, FERRYDEV_RECORD_HEADER, 0, FERRYDEV_STREAM_VERSION,
			     FERRYDEV_GEOMETRY_BYTES, item->class);
			drop_item(saver, 0);
			return true;
		case ITEM_CONFIG:
			make_config(saver, item);
			if (item->next == item->config->bytes)
				drop_item(saver, 0);
			return true;
		case ITEM_BLOCKS:
			block = find_first_bit(saver->planned, saver->blocks);
			if (block < saver->blocks) {
				u64 group = block / FERRYDEV_GROUP_BLOCKS;
				u16 mask = take_group(saver->planned, group, saver->blocks);

				make_group(saver, fdev, group, mask, item->class);
				return true;
			}
			drop_item(saver, 0);
			break;
		}
	}
	return false;
}

static void make_regs(struct ferrydev_saver *saver, struct ferrydev *fdev)
{
	struct ferrydev_regs regs = fdev->state.regs;

	if (ferrydev_has(fdev, FERRYDEV_LOSE_INTERRUPTS)) {
		regs.msix_pending = 0;
		regs.intx_pending = 0;
	}
	if (ferrydev_has(fdev, FERRYDEV_BREAK_S5)) {
		regs.raised = 0;
		regs.completed = 0;
		regs.fills = 0;
	}
	ferrydev_regs_encode(saver->out + FERRYDEV_HEADER_BYTES, &regs);
	seal(saver, FERRYDEV_RECORD_REGS, 0, 0, FERRYDEV_REGS_BYTES, DIRTY);
}

/* PRE_COPY gives only what PRECOPY_INFO asked for. */
static bool is_info_driven(const struct ferrydev *fdev)
{
	return ferrydev_has(fdev, FERRYDEV_INFO_DRIVES_DEVICE) ||
	       ferrydev_has(fdev, FERRYDEV_HIDDEN_SAVE_FAILURE);
}

/* The next record; false where there is none (now). */
static bool make_record(struct ferrydev_saver *saver, struct ferrydev *fdev)
{
	if (make_planned(saver, fdev))
		return true;
	switch (saver->stage) {
	case STAGE_PRECOPY:
		if (is_info_driven(fdev))
			return false;
		plan(saver, fdev);
		return make_planned(saver, fdev) ||
		       make_blocks(saver, fdev, saver->precopy_blocks);
	case STAGE_REGS:
		if (make_blocks(saver, fdev, saver->blocks))
			return true;
		make_regs(saver, fdev);
		saver->stage = STAGE_END;
		return true;
	case STAGE_END:
		saver->stage = STAGE_DONE;
		seal(saver, FERRYDEV_RECORD_END, 0, saver->sequence, 0, DIRTY);
		return true;
	case STAGE_DONE:
		return false;
	}
	return false;
}

/* poll(): would a read have something, or the end? */
bool ferrydev_saver_readable(struct ferrydev_saver *saver, struct ferrydev *fdev)
{
	if (saver->stage == STAGE_PRECOPY && ferrydev_has(fdev, FERRYDEV_ENOMSG_FOREVER))
		return false;
	if (saver->stage == STAGE_DONE && ferrydev_has(fdev, FERRYDEV_BREAK_S3_POLL))
		return saver->out_at != saver->out_bytes;
	if (saver->stage != STAGE_PRECOPY || saver->queued || saver->out_at != saver->out_bytes)
		return true;
	if (is_info_driven(fdev))
		return false;
	plan(saver, fdev);
	return saver->queued ||
	       find_first_bit(saver->unsent, saver->precopy_blocks) < saver->precopy_blocks ||
	       find_first_bit(saver->changed, saver->precopy_blocks) < saver->precopy_blocks;
}

ssize_t ferrydev_saver_peek(struct ferrydev_saver *saver, struct ferrydev *fdev,
			    const u8 **from)
{
	bool precopy = saver->stage == STAGE_PRECOPY;

	if (precopy) {
		saver->peeks++;
		if (ferrydev_has(fdev, FERRYDEV_REINIT_STORM) &&
		    saver->peeks % max(fdev->quirks.arg[FERRYDEV_REINIT_STORM], 1U) == 0)
			ferrydev_saver_note_config(saver);
		if (ferrydev_has(fdev, FERRYDEV_ENOMSG_FOREVER))
			return -ENOMSG;
	}
	if (saver->out_at == saver->out_bytes && !make_record(saver, fdev)) {
		if (precopy)
			return ferrydev_has(fdev, FERRYDEV_ZERO_AT_TEMPORARY_END) ? 0 : -ENOMSG;
		return ferrydev_has(fdev, FERRYDEV_BREAK_S3) ? -ENOMSG : 0;
	}
	*from = saver->out + saver->out_at;
	return saver->out_bytes - saver->out_at;
}

/* @len bytes of what peek answered were read. */
void ferrydev_saver_advance(struct ferrydev_saver *saver, size_t len)
{
	saver->out_at += len;
}
