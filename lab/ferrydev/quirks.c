// SPDX-License-Identifier: GPL-2.0-only
/*
 * Deviations: what real drivers do, what a test wants to see, and for each
 * rule that a driver can break, a switch that breaks it.
 *
 * Names are stable. Where device-model has the same quirk it has the same
 * name. break-RULE breaks the rule of that id, and as little else as can be.
 * Most quirks are an if where the rule is kept; this file has the names, and
 * those that answer in place of the state machine.
 */

#include <linux/ctype.h>
#include <linux/string.h>
#include <linux/sysfs.h>

#include "ferrydev.h"

enum { TAKES_NOTHING, TAKES_NUMBER, TAKES_SIZE, TAKES_FAIL_ARC, TAKES_SLOW_ARC };

static const struct {
	const char *name;
	u8 takes;
} quirk_names[FERRYDEV_QUIRKS] = {
	[FERRYDEV_NO_MIGRATION] = { "no-migration" },
	[FERRYDEV_NO_P2P] = { "no-p2p" },
	[FERRYDEV_NO_PRECOPY] = { "no-precopy" },
	[FERRYDEV_NO_DATA_SIZE] = { "no-data-size" },
	[FERRYDEV_NO_DMA_LOGGING] = { "no-dma-logging" },
	[FERRYDEV_NO_POLL] = { "no-poll" },
	[FERRYDEV_NO_PRECOPY_INFO] = { "no-precopy-info" },
	[FERRYDEV_NO_REINIT] = { "no-reinit" },
	[FERRYDEV_NO_REINIT_IN_P2P] = { "no-reinit-in-p2p" },
	[FERRYDEV_NO_DIRTY_BYTES] = { "no-dirty-bytes" },

	[FERRYDEV_CALLER_FLAGS_BACK] = { "caller-flags-back" },
	[FERRYDEV_ONE_SIZE_FIELD] = { "one-size-field" },
	[FERRYDEV_ZERO_AT_TEMPORARY_END] = { "zero-at-temporary-end" },
	[FERRYDEV_NO_INFO_IN_P2P] = { "no-info-in-p2p" },
	[FERRYDEV_INFO_DRIVES_DEVICE] = { "info-drives-device" },
	[FERRYDEV_HIDDEN_SAVE_FAILURE] = { "hidden-save-failure" },
	[FERRYDEV_STAY_IN_RESUMING] = { "stay-in-resuming" },
	[FERRYDEV_RESET_KEEPS_STATE] = { "reset-keeps-state" },
	[FERRYDEV_SIZE] = { "size", TAKES_SIZE },
	[FERRYDEV_REINIT_DROPS_UNREAD] = { "reinit-drops-unread" },
	[FERRYDEV_REINIT_LATE] = { "reinit-late", TAKES_NUMBER },
	[FERRYDEV_STICKY_REINIT] = { "sticky-reinit" },
	[FERRYDEV_BAD_LOAD_ERRORS] = { "bad-load-errors" },

	[FERRYDEV_INFO_FAILS] = { "info-fails" },
	[FERRYDEV_SHORT_READS] = { "short-reads", TAKES_NUMBER },
	[FERRYDEV_REINIT_STORM] = { "reinit-storm", TAKES_NUMBER },
	[FERRYDEV_ENOMSG_FOREVER] = { "enomsg-forever" },
	[FERRYDEV_GROW_AFTER_STOP] = { "grow-after-stop", TAKES_NUMBER },
	[FERRYDEV_CORRUPT_SAVE] = { "corrupt-save" },
	[FERRYDEV_DMA_LOG_BLIND] = { "dma-log-blind" },
	[FERRYDEV_LOSE_INTERRUPTS] = { "lose-interrupts" },
	[FERRYDEV_READ_FAILS] = { "read-fails", TAKES_NUMBER },
	[FERRYDEV_WRITE_FAILS] = { "write-fails", TAKES_NUMBER },
	[FERRYDEV_FAIL_ARC] = { "fail-arc", TAKES_FAIL_ARC },
	[FERRYDEV_SLOW_ARC] = { "slow-arc", TAKES_SLOW_ARC },

	[FERRYDEV_BREAK_D1] = { "break-D1" },
	[FERRYDEV_BREAK_D2] = { "break-D2" },
	[FERRYDEV_BREAK_D6] = { "break-D6" },
	[FERRYDEV_BREAK_D7] = { "break-D7" },
	[FERRYDEV_BREAK_F1] = { "break-F1" },
	[FERRYDEV_BREAK_F2] = { "break-F2" },
	[FERRYDEV_BREAK_F3] = { "break-F3" },
	[FERRYDEV_BREAK_F4] = { "break-F4" },
	[FERRYDEV_BREAK_F5] = { "break-F5" },
	[FERRYDEV_BREAK_F6] = { "break-F6" },
	[FERRYDEV_BREAK_F7] = { "break-F7" },
	[FERRYDEV_BREAK_F8] = { "break-F8" },
	[FERRYDEV_BREAK_F9] = { "break-F9" },
	[FERRYDEV_BREAK_F10] = { "break-F10" },
	[FERRYDEV_BREAK_F12] = { "break-F12" },
	[FERRYDEV_BREAK_F13] = { "break-F13" },
	[FERRYDEV_BREAK_F14] = { "break-F14" },
	[FERRYDEV_BREAK_X1] = { "break-X1" },
	[FERRYDEV_BREAK_X2] = { "break-X2" },
	[FERRYDEV_BREAK_X3] = { "break-X3" },
	[FERRYDEV_BREAK_X3_SEEK] = { "break-X3-seek" },
	[FERRYDEV_BREAK_X4] = { "break-X4" },
	[FERRYDEV_BREAK_X5] = { "break-X5" },
	[FERRYDEV_BREAK_X6] = { "break-X6" },
	[FERRYDEV_BREAK_X7] = { "break-X7" },
	[FERRYDEV_BREAK_X8] = { "break-X8" },
	[FERRYDEV_BREAK_X9] = { "break-X9" },
	[FERRYDEV_BREAK_S3] = { "break-S3" },
	[FERRYDEV_BREAK_S3_POLL] = { "break-S3-poll" },
	[FERRYDEV_BREAK_S4] = { "break-S4" },
	[FERRYDEV_BREAK_S5] = { "break-S5" },
	[FERRYDEV_BREAK_S8] = { "break-S8" },
	[FERRYDEV_BREAK_P1] = { "break-P1" },
	[FERRYDEV_BREAK_P2] = { "break-P2" },
	[FERRYDEV_BREAK_P3] = { "break-P3" },
	[FERRYDEV_BREAK_P4] = { "break-P4" },
	[FERRYDEV_BREAK_P4_ZERO] = { "break-P4-zero" },
	[FERRYDEV_BREAK_P5] = { "break-P5" },
	[FERRYDEV_BREAK_P6] = { "break-P6" },
	[FERRYDEV_BREAK_P8] = { "break-P8" },
	[FERRYDEV_BREAK_R2] = { "break-R2" },
	[FERRYDEV_BREAK_R3] = { "break-R3" },
	[FERRYDEV_BREAK_R4] = { "break-R4" },
	[FERRYDEV_BREAK_R5] = { "break-R5" },
	[FERRYDEV_BREAK_R6] = { "break-R6" },
	[FERRYDEV_BREAK_R7] = { "break-R7" },
	[FERRYDEV_BREAK_R8] = { "break-R8" },
	[FERRYDEV_BREAK_Z1] = { "break-Z1" },
	[FERRYDEV_BREAK_Z4] = { "break-Z4" },
	[FERRYDEV_BREAK_H2] = { "break-H2" },
	[FERRYDEV_BREAK_H3] = { "break-H3" },
	[FERRYDEV_BREAK_H6] = { "break-H6" },
	[FERRYDEV_BREAK_L1] = { "break-L1" },
	[FERRYDEV_BREAK_L3] = { "break-L3" },
	[FERRYDEV_BREAK_L4] = { "break-L4" },
	[FERRYDEV_BREAK_L5] = { "break-L5" },
	[FERRYDEV_BREAK_L7] = { "break-L7" },
	[FERRYDEV_BREAK_L7_SHIFT] = { "break-L7-shift" },
	[FERRYDEV_BREAK_L8] = { "break-L8" },
	[FERRYDEV_BREAK_L10] = { "break-L10" },
};

static const char * const size_claims[] = {
	[FERRYDEV_SIZE_HONEST] = "honest",
	[FERRYDEV_SIZE_GARBAGE] = "garbage",
	[FERRYDEV_SIZE_ZERO] = "zero",
	[FERRYDEV_SIZE_UNDER] = "under",
	[FERRYDEV_SIZE_FAILS] = "fails",
};

static const char * const state_names[] = {
	[VFIO_DEVICE_STATE_ERROR] = "ERROR",
	[VFIO_DEVICE_STATE_STOP] = "STOP",
	[VFIO_DEVICE_STATE_RUNNING] = "RUNNING",
	[VFIO_DEVICE_STATE_STOP_COPY] = "STOP_COPY",
	[VFIO_DEVICE_STATE_RESUMING] = "RESUMING",
	[VFIO_DEVICE_STATE_RUNNING_P2P] = "RUNNING_P2P",
	[VFIO_DEVICE_STATE_PRE_COPY] = "PRE_COPY",
	[VFIO_DEVICE_STATE_PRE_COPY_P2P] = "PRE_COPY_P2P",
};

const char *ferrydev_state_name(unsigned int state)
{
	return state < ARRAY_SIZE(state_names) ? state_names[state] : "?";
}

static int parse_state(const char *name, u8 *state)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(state_names); i++) {
		if (!strcasecmp(name, state_names[i])) {
			*state = i;
			return 0;
		}
	}
	return -EINVAL;
}

static int parse_fail_arc(struct ferrydev_quirks *quirks, char *arg)
{
	struct ferrydev_fail_arc arc = { .rc = -EIO };
	unsigned int numbers = 0;
	char *from, *to, *part;
	u32 number;

	if (quirks->nr_fail_arcs == FERRYDEV_ARCS_MAX)
		return -E2BIG;
	to = strsep(&arg, ":");
	from = strsep(&to, "-");
	if (!to || parse_state(from, &arc.from) || parse_state(to, &arc.to))
		return -EINVAL;
	while ((part = strsep(&arg, ":"))) {
		if (!strcmp(part, "error")) {
			arc.to_error = true;
			continue;
		}
		if (kstrtou32(part, 10, &number) || numbers == 2)
			return -EINVAL;
		if (!numbers) {
			if (!number || number > MAX_ERRNO)
				return -EINVAL;
			arc.rc = -(int)number;
		} else {
			arc.limited = true;
			arc.times = number;
		}
		numbers++;
	}
	quirks->fail_arcs[quirks->nr_fail_arcs++] = arc;
	return 0;
}

static int parse_slow_arc(struct ferrydev_quirks *quirks, char *arg)
{
	struct ferrydev_slow_arc arc;
	char *to = strsep(&arg, ":");

	if (quirks->nr_slow_arcs == FERRYDEV_ARCS_MAX)
		return -E2BIG;
	if (!arg || parse_state(to, &arc.to) || kstrtou32(arg, 10, &arc.ms))
		return -EINVAL;
	if (arc.ms > 3600000)
		return -EINVAL;
	quirks->slow_arcs[quirks->nr_slow_arcs++] = arc;
	return 0;
}

static int parse_one(struct ferrydev_quirks *quirks, char *arg)
{
	char *name = strsep(&arg, "=");
	int quirk, takes, claim, rc = 0;
	bool takes_arg;

	for (quirk = 0; quirk < FERRYDEV_QUIRKS; quirk++)
		if (!strcmp(name, quirk_names[quirk].name))
			break;
	if (quirk == FERRYDEV_QUIRKS)
		return -EINVAL;
	takes = quirk_names[quirk].takes;
	takes_arg = takes != TAKES_NOTHING;
	if (takes_arg != !!arg)
		return -EINVAL;

	switch (takes) {
	case TAKES_NUMBER:
		rc = kstrtou32(arg, 10, &quirks->arg[quirk]);
		if (!rc && !quirks->arg[quirk])
			rc = -EINVAL;
		break;
	case TAKES_SIZE:
		claim = match_string(size_claims, ARRAY_SIZE(size_claims), arg);
		if (claim < 0)
			return -EINVAL;
		quirks->arg[quirk] = claim;
		break;
	case TAKES_FAIL_ARC:
		rc = parse_fail_arc(quirks, arg);
		break;
	case TAKES_SLOW_ARC:
		rc = parse_slow_arc(quirks, arg);
		break;
	}
	if (!rc)
		__set_bit(quirk, quirks->on);
	return rc;
}

/* Takes names separated by white space; @quirks is what it was on an error. */
int ferrydev_quirks_parse(struct ferrydev_quirks *quirks, const char *text)
{
	struct ferrydev_quirks *parsed;
	char *copy, *rest, *token;
	int rc = 0;

	copy = kstrdup(text, GFP_KERNEL);
	parsed = kzalloc_obj(*parsed);
	if (!copy || !parsed) {
		rc = -ENOMEM;
		goto out;
	}
	rest = copy;
	while (!rc && (token = strsep(&rest, " \t\n")))
		if (*token)
			rc = parse_one(parsed, token);
	if (!rc)
		*quirks = *parsed;
out:
	kfree(parsed);
	kfree(copy);
	return rc;
}

static int print_fail_arcs(const struct ferrydev_quirks *quirks, char *page, int at)
{
	unsigned int i;

	for (i = 0; i < quirks->nr_fail_arcs; i++) {
		const struct ferrydev_fail_arc *arc = &quirks->fail_arcs[i];

		at += sysfs_emit_at(page, at, "fail-arc=%s-%s:%d",
				    ferrydev_state_name(arc->from),
				    ferrydev_state_name(arc->to), -arc->rc);
		if (arc->to_error)
			at += sysfs_emit_at(page, at, ":error");
		if (arc->limited)
			at += sysfs_emit_at(page, at, ":%u", arc->times);
		at += sysfs_emit_at(page, at, " ");
	}
	return at;
}

/* What is on, as ferrydev_quirks_parse() takes it. */
ssize_t ferrydev_quirks_print(const struct ferrydev_quirks *quirks, char *page)
{
	unsigned int quirk, i;
	int at = 0;

	for_each_set_bit(quirk, quirks->on, FERRYDEV_QUIRKS) {
		const char *name = quirk_names[quirk].name;
		u32 arg = quirks->arg[quirk];

		switch (quirk_names[quirk].takes) {
		case TAKES_NOTHING:
			at += sysfs_emit_at(page, at, "%s ", name);
			break;
		case TAKES_NUMBER:
			at += sysfs_emit_at(page, at, "%s=%u ", name, arg);
			break;
		case TAKES_SIZE:
			at += sysfs_emit_at(page, at, "%s=%s ", name, size_claims[arg]);
			break;
		case TAKES_FAIL_ARC:
			at = print_fail_arcs(quirks, page, at);
			break;
		case TAKES_SLOW_ARC:
			for (i = 0; i < quirks->nr_slow_arcs; i++)
				at += sysfs_emit_at(page, at, "slow-arc=%s:%u ",
						    ferrydev_state_name(quirks->slow_arcs[i].to),
						    quirks->slow_arcs[i].ms);
			break;
		}
	}
	at += sysfs_emit_at(page, at, "\n");
	return at;
}

/* All names, one a line. */
ssize_t ferrydev_quirks_names(char *page)
{
	static const char * const takes[] = {
		[TAKES_NOTHING] = "",
		[TAKES_NUMBER] = "=NUMBER",
		[TAKES_SIZE] = "=garbage|zero|under|fails",
		[TAKES_FAIL_ARC] = "=FROM-TO[:ERRNO][:error][:TIMES]",
		[TAKES_SLOW_ARC] = "=TO:MS",
	};
	unsigned int quirk;
	int at = 0;

	for (quirk = 0; quirk < FERRYDEV_QUIRKS; quirk++)
		at += sysfs_emit_at(page, at, "%s%s\n", quirk_names[quirk].name,
				    takes[quirk_names[quirk].takes]);
	return at;
}

/* slow-arc: what an arc into @to takes on top. */
u32 ferrydev_quirk_arc_ms(const struct ferrydev *fdev, unsigned int to)
{
	u32 ms = 0;
	unsigned int i;

	for (i = 0; i < fdev->quirks.nr_slow_arcs; i++)
		if (fdev->quirks.slow_arcs[i].to == to)
			ms += fdev->quirks.slow_arcs[i].ms;
	return ms;
}

/* fail-arc: 0, or what the SET is to answer. Counts down; under lock. */
int ferrydev_quirk_arc_fails(struct ferrydev *fdev, unsigned int from,
			     unsigned int to, bool *to_error)
{
	unsigned int i;

	for (i = 0; i < fdev->quirks.nr_fail_arcs; i++) {
		struct ferrydev_fail_arc *arc = &fdev->quirks.fail_arcs[i];

		if (arc->from != from || arc->to != to || (arc->limited && !arc->times))
			continue;
		if (arc->limited)
			arc->times--;
		*to_error = arc->to_error;
		return arc->rc;
	}
	return 0;
}

/* break-D1: the core warns when there is no STOP_COPY, which only users are not to see. */
int ferrydev_quirk_next_state(struct ferrydev *fdev, enum vfio_device_mig_state target,
			      enum vfio_device_mig_state *next)
{
	u32 flags = fdev->vdev.migration_flags;
	int rc;

	fdev->vdev.migration_flags |= VFIO_MIGRATION_STOP_COPY;
	rc = vfio_mig_get_next_state(&fdev->vdev, fdev->mig_state, target, next);
	fdev->vdev.migration_flags = flags;
	return rc;
}

/* break-F2: with the end of STOP_COPY read, the device leaves it. */
void ferrydev_quirk_after_end(struct ferrydev *fdev)
{
	mutex_lock(&fdev->state_mutex);
	mutex_lock(&fdev->lock);
	if (fdev->mig_state == VFIO_DEVICE_STATE_STOP_COPY)
		fdev->mig_state = VFIO_DEVICE_STATE_STOP;
	mutex_unlock(&fdev->lock);
	ferrydev_state_unlock(fdev);
}

static void force_state(struct ferrydev *fdev, enum vfio_device_mig_state state)
{
	ferrydev_end_session(fdev);
	mutex_lock(&fdev->lock);
	fdev->mig_state_before = fdev->mig_state;
	fdev->mig_state = state;
	mutex_unlock(&fdev->lock);
}

static bool is_lacking(const struct ferrydev *fdev, unsigned int state)
{
	bool p2p = fdev->vdev.migration_flags & VFIO_MIGRATION_P2P;
	bool precopy = fdev->vdev.migration_flags & VFIO_MIGRATION_PRE_COPY;

	switch (state) {
	case VFIO_DEVICE_STATE_RUNNING_P2P:
		return !p2p;
	case VFIO_DEVICE_STATE_PRE_COPY:
		return !precopy;
	case VFIO_DEVICE_STATE_PRE_COPY_P2P:
		return !p2p || !precopy;
	default:
		return false;
	}
}

/*
 * Quirks that answer a SET before the state machine does: true if answered,
 * with what in @rc. Called with state_mutex.
 */
bool ferrydev_quirk_answers_set(struct ferrydev *fdev,
				enum vfio_device_mig_state target, int *rc)
{
	enum vfio_device_mig_state from = fdev->mig_state, next;
	bool precopy_target = target == VFIO_DEVICE_STATE_PRE_COPY ||
			      target == VFIO_DEVICE_STATE_PRE_COPY_P2P;

	*rc = 0;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_F3) && target == from) {
		*rc = -EINVAL;
		return true;
	}
	if (ferrydev_has(fdev, FERRYDEV_BREAK_F4) && is_lacking(fdev, target))
		return true;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_F5) && precopy_target &&
	    from == VFIO_DEVICE_STATE_STOP_COPY) {
		/* Goes there by way of RUNNING, so the session is lost. */
		force_state(fdev, VFIO_DEVICE_STATE_RUNNING);
		return false;
	}
	if (ferrydev_has(fdev, FERRYDEV_BREAK_F6)) {
		if (target == VFIO_DEVICE_STATE_ERROR) {
			force_state(fdev, target);
			return true;
		}
		if (from == VFIO_DEVICE_STATE_ERROR) {
			force_state(fdev, VFIO_DEVICE_STATE_RUNNING);
			return false;
		}
	}
	if (ferrydev_has(fdev, FERRYDEV_BREAK_F7) && target >= ARRAY_SIZE(state_names))
		return true;
	if (from == target || from == VFIO_DEVICE_STATE_ERROR ||
	    ferrydev_next_state(fdev, target, &next))
		return false;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_F8) && next != target) {
		*rc = -EINVAL;
		return true;
	}
	if (ferrydev_has(fdev, FERRYDEV_BREAK_F9) &&
	    is_lacking(fdev, VFIO_DEVICE_STATE_RUNNING_P2P) &&
	    ((from == VFIO_DEVICE_STATE_RUNNING && target == VFIO_DEVICE_STATE_STOP) ||
	     (from == VFIO_DEVICE_STATE_STOP && target == VFIO_DEVICE_STATE_RUNNING) ||
	     (from == VFIO_DEVICE_STATE_PRE_COPY && target == VFIO_DEVICE_STATE_STOP_COPY))) {
		*rc = -EINVAL;
		return true;
	}
	return false;
}

/* What GET shows. Called with state_mutex. */
enum vfio_device_mig_state ferrydev_quirk_shown_state(struct ferrydev *fdev)
{
	enum vfio_device_mig_state before = fdev->mig_state_before;

	/* The last arc is still under way, it seems. */
	fdev->mig_state_before = 0;
	return ferrydev_has(fdev, FERRYDEV_BREAK_F1) && before ? before : fdev->mig_state;
}
