// SPDX-License-Identifier: GPL-2.0-only
/*
 * The state that migrates: registers, a configuration, bulk state.
 *
 * Hundreds of MB of state are neither kept nor made in advance. What the guest
 * makes the device write is a pattern that follows from a number (of the fill,
 * of the generation), so any part of it can be made when it is read. Memory is
 * taken for what a stream brought, one block at a time.
 *
 * All under lock.
 */

#include <crypto/blake2s.h>
#include <linux/math64.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/unaligned.h>

#include "ferrydev.h"

#define GOLDEN		0x9e3779b97f4a7c15ULL
#define DOMAIN_CONFIG	0x636f6e66ULL
#define DOMAIN_BULK	0x62756c6bULL

/* The finaliser of splitmix64. */
static u64 mix(u64 x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

static u64 pattern_seed(u64 domain, u64 a, u64 b)
{
	return mix(mix((mix(domain) + a) * GOLDEN) + b);
}

/* The pattern's bytes from @offset, a multiple of 8, on. */
static void pattern_read(u64 seed, u64 offset, u8 *out, size_t len)
{
	u64 counter = seed + offset / 8 * GOLDEN;
	u8 last[8];

	for (; len >= 8; len -= 8, out += 8) {
		put_unaligned_le64(mix(counter), out);
		counter += GOLDEN;
	}
	put_unaligned_le64(mix(counter), last);
	memcpy(out, last, len);
}

/* Takes over @stored, kvmalloc'ed. Small, so it does not fail. */
struct ferrydev_config *ferrydev_config_new(u32 generation, u64 bytes, void *stored)
{
	struct ferrydev_config *config = kzalloc_obj(*config, GFP_KERNEL | __GFP_NOFAIL);

	kref_init(&config->kref);
	config->generation = generation;
	config->bytes = bytes;
	config->stored = stored;
	return config;
}

struct ferrydev_config *ferrydev_config_get(struct ferrydev_config *config)
{
	kref_get(&config->kref);
	return config;
}

static void config_release(struct kref *kref)
{
	struct ferrydev_config *config = container_of(kref, struct ferrydev_config, kref);

	kvfree(config->stored);
	kfree(config);
}

void ferrydev_config_put(struct ferrydev_config *config)
{
	if (config)
		kref_put(&config->kref, config_release);
}

/* @offset is a multiple of 8, and the range is inside. */
void ferrydev_config_read(const struct ferrydev_config *config, u64 offset,
			  void *out, size_t len)
{
	if (config->stored)
		memcpy(out, config->stored + offset, len);
	else
		pattern_read(pattern_seed(DOMAIN_CONFIG, config->generation, config->bytes),
			     offset, out, len);
}

int ferrydev_state_alloc(struct ferrydev *fdev)
{
	u64 blocks = ferrydev_blocks(&fdev->geometry);

	fdev->state.blocks = kvzalloc_objs(*fdev->state.blocks, max(blocks, 1ULL));
	return fdev->state.blocks ? 0 : -ENOMEM;
}

void ferrydev_state_free(struct ferrydev *fdev)
{
	u64 block, blocks = ferrydev_blocks(&fdev->geometry);

	if (fdev->state.blocks)
		for (block = 0; block < blocks; block++)
			kfree(fdev->state.blocks[block].stored);
	kvfree(fdev->state.blocks);
	fdev->state.blocks = NULL;
	ferrydev_config_put(fdev->state.config);
	fdev->state.config = NULL;
}

/* As after power-on or reset. */
void ferrydev_state_power_on(struct ferrydev *fdev)
{
	const struct ferrydev_geometry *geometry = &fdev->geometry;
	u64 block, blocks = ferrydev_blocks(geometry);

	memset(&fdev->state.regs, 0, sizeof(fdev->state.regs));
	fdev->state.regs.config_kib = geometry->config_kib;
	ferrydev_state_reconfigure(fdev, ferrydev_config_new(0, geometry->config_kib * 1024ULL,
							     NULL));
	for (block = 0; block < blocks; block++)
		ferrydev_block_fill(fdev, block, 0);
}

/* Takes over @config. */
void ferrydev_state_reconfigure(struct ferrydev *fdev, struct ferrydev_config *config)
{
	ferrydev_config_put(fdev->state.config);
	fdev->state.config = config;
}

void ferrydev_block_fill(struct ferrydev *fdev, u64 block, u64 fill)
{
	struct ferrydev_block *slot = &fdev->state.blocks[block];

	kfree(slot->stored);
	slot->stored = NULL;
	slot->fill = fill;
}

int ferrydev_block_store(struct ferrydev *fdev, u64 block, const void *bytes)
{
	struct ferrydev_block *slot = &fdev->state.blocks[block];

	if (!slot->stored)
		slot->stored = kmalloc(FERRYDEV_BLOCK_BYTES, GFP_KERNEL_ACCOUNT);
	if (!slot->stored)
		return -ENOMEM;
	memcpy(slot->stored, bytes, ferrydev_block_bytes(&fdev->geometry, block));
	return 0;
}

/* Answers the block's length. */
u32 ferrydev_block_read(const struct ferrydev *fdev, u64 block, void *out)
{
	const struct ferrydev_block *slot = &fdev->state.blocks[block];
	u32 len = ferrydev_block_bytes(&fdev->geometry, block);

	if (slot->stored)
		memcpy(out, slot->stored, len);
	else
		pattern_read(pattern_seed(DOMAIN_BULK, slot->fill, block), 0, out, len);
	return len;
}

/*
 * BLAKE2s over all of it, from scratch. It knows nothing of streams: whether a
 * byte is made or was loaded does not matter, only what it is. @scratch has room
 * for FERRYDEV_PAYLOAD_BYTES_MAX.
 */
void ferrydev_state_digest(const struct ferrydev *fdev, u8 *digest, void *scratch)
{
	static const char title[] = "ferrydev state digest 1";
	const struct ferrydev_config *config = fdev->state.config;
	u64 at, block, blocks = ferrydev_blocks(&fdev->geometry);
	struct blake2s_ctx ctx;
	u8 head[FERRYDEV_REGS_BYTES + 20];
	u32 used = 0;

	blake2s_init(&ctx, FERRYDEV_DIGEST_BYTES);
	blake2s_update(&ctx, (const u8 *)title, sizeof(title) - 1);
	ferrydev_regs_encode(head, &fdev->state.regs);
	put_unaligned_le32(config->generation, head + FERRYDEV_REGS_BYTES);
	put_unaligned_le64(config->bytes, head + FERRYDEV_REGS_BYTES + 4);
	put_unaligned_le64(fdev->geometry.bulk_bytes, head + FERRYDEV_REGS_BYTES + 12);
	blake2s_update(&ctx, head, sizeof(head));

	for (at = 0; at < config->bytes; at += used) {
		used = min_t(u64, config->bytes - at, FERRYDEV_PAYLOAD_BYTES_MAX);
		ferrydev_config_read(config, at, scratch, used);
		blake2s_update(&ctx, scratch, used);
		cond_resched();
	}
	for (block = 0; block < blocks; block++) {
		used = ferrydev_block_read(fdev, block, scratch);
		blake2s_update(&ctx, scratch, used);
		cond_resched();
	}
	blake2s_final(&ctx, digest);
}
