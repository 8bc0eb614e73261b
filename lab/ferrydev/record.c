// SPDX-License-Identifier: GPL-2.0-only
/*
 * The format of the stream: records with a header of 32 bytes, little endian.
 *
 *   0       4      6     8          16       24              28         32
 *   | magic | kind | arg | sequence | value  | payload bytes | checksum | payload
 *
 *   HEADER  CONFIG  CONFIG_DATA ...  BULK BULK ...  [CONFIG ... BULK ...]  REGS  END
 *
 * HEADER       value: version; payload: sizes of the device
 * CONFIG       value: size in bytes; payload: generation. Voids any before it
 * CONFIG_DATA  value: offset; payload: its bytes from there on
 * BULK         value: group; arg: bit i for block i of it; payload: their bytes
 * REGS         payload: registers, counters, pending interrupts
 * END          value: number of records before it
 *
 * The sequence counts from 0 and the checksum (CRC-32) covers the 28 bytes
 * before it and the payload, so a record that is lost, repeated, moved or
 * damaged is found. END makes a stream that was cut short known as one.
 */

#include <linux/crc32.h>
#include <linux/unaligned.h>

#include "ferrydev.h"

#define RECORD_MAGIC	0x31445246	/* FRD1 */

static u32 checksum(const u8 *record, u32 payload_bytes)
{
	u32 crc = crc32_le(~0, record, 28);

	return ~crc32_le(crc, record + FERRYDEV_HEADER_BYTES, payload_bytes);
}

/* Writes the header before a payload that is there already. */
void ferrydev_record_seal(u8 *record, u16 kind, u16 arg, u64 sequence, u64 value,
			  u32 payload_bytes)
{
	put_unaligned_le32(RECORD_MAGIC, record);
	put_unaligned_le16(kind, record + 4);
	put_unaligned_le16(arg, record + 6);
	put_unaligned_le64(sequence, record + 8);
	put_unaligned_le64(value, record + 16);
	put_unaligned_le32(payload_bytes, record + 24);
	put_unaligned_le32(checksum(record, payload_bytes), record + 28);
}

/* Everything in it is a claim; only the payload's length is bounded here. */
int ferrydev_record_parse(const u8 *header, struct ferrydev_record *record)
{
	if (get_unaligned_le32(header) != RECORD_MAGIC)
		return -EINVAL;
	record->kind = get_unaligned_le16(header + 4);
	record->arg = get_unaligned_le16(header + 6);
	record->sequence = get_unaligned_le64(header + 8);
	record->value = get_unaligned_le64(header + 16);
	record->payload_bytes = get_unaligned_le32(header + 24);
	record->checksum = get_unaligned_le32(header + 28);
	return record->payload_bytes > FERRYDEV_PAYLOAD_BYTES_MAX ? -EINVAL : 0;
}

bool ferrydev_record_intact(const u8 *record, const struct ferrydev_record *parsed)
{
	return checksum(record, parsed->payload_bytes) == parsed->checksum;
}

void ferrydev_geometry_encode(u8 *out, const struct ferrydev_geometry *geometry)
{
	put_unaligned_le64(geometry->bulk_bytes, out);
	put_unaligned_le32(geometry->config_kib, out + 8);
	put_unaligned_le32(geometry->config_kib_max, out + 12);
}

void ferrydev_regs_encode(u8 *out, const struct ferrydev_regs *regs)
{
	const u32 words[] = {
		regs->control, regs->status, regs->config_kib, regs->dma_pages,
		regs->dma_rate, regs->vector, regs->fill_kib, regs->scratch,
	};
	const u64 longs[] = {
		regs->dma_addr, regs->completed, regs->raised,
		regs->owed, regs->fills, regs->fill_cursor,
	};
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(words); i++, out += 4)
		put_unaligned_le32(words[i], out);
	for (i = 0; i < ARRAY_SIZE(longs); i++, out += 8)
		put_unaligned_le64(longs[i], out);
	memset(out, 0, 8);
	out[0] = regs->irq_owed;
	out[1] = regs->msix_pending;
	out[2] = regs->intx_pending;
}

/* Refuses what no device can hold. */
int ferrydev_regs_decode(const u8 *in, const struct ferrydev_geometry *geometry,
			 struct ferrydev_regs *regs)
{
	u32 *words[] = {
		&regs->control, &regs->status, &regs->config_kib, &regs->dma_pages,
		&regs->dma_rate, &regs->vector, &regs->fill_kib, &regs->scratch,
	};
	u64 *longs[] = {
		&regs->dma_addr, &regs->completed, &regs->raised,
		&regs->owed, &regs->fills, &regs->fill_cursor,
	};
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(words); i++, in += 4)
		*words[i] = get_unaligned_le32(in);
	for (i = 0; i < ARRAY_SIZE(longs); i++, in += 8)
		*longs[i] = get_unaligned_le64(in);
	regs->irq_owed = in[0];
	regs->msix_pending = in[1];
	regs->intx_pending = in[2];

	if (regs->control & ~FERRYDEV_CONTROL_MASK ||
	    regs->status & ~FERRYDEV_STATUS_MASK ||
	    regs->config_kib > geometry->config_kib_max ||
	    regs->dma_rate > FERRYDEV_DMA_RATE_MAX ||
	    regs->vector >= FERRYDEV_MSIX_VECTORS ||
	    regs->fill_cursor >= max(ferrydev_blocks(geometry), 1ULL) ||
	    regs->irq_owed > 1 ||
	    regs->msix_pending & ~FERRYDEV_MSIX_MASK ||
	    regs->intx_pending > 1 ||
	    memchr_inv(in + 3, 0, 5))
		return -EINVAL;
	return 0;
}
