// SPDX-License-Identifier: GPL-2.0-only
/*
 * The migration state machine, reset, and MIG_DATA_SIZE.
 *
 * The core cuts a SET into the arcs that the device has
 * (vfio_mig_get_next_state()); the driver takes one after the other and hands
 * out a file on the last, where that arc begins a session. An arc takes its time
 * while the device goes on working in the state it leaves, and is then taken in
 * one hold of the lock: no DMA and no interrupt is half in one state.
 */

#include <linux/file.h>
#include <linux/fs.h>

#include "ferrydev.h"

/* What a driver of the field claimed (QEMU commit 7c20d5f31d). */
#define GARBAGE_STOP_COPY	18446744073709543408ULL

#define ARC(from, to)	((from) << 8 | (to))
#define STATE(name)	VFIO_DEVICE_STATE_##name

/* Ends the live session, if there is one. Called with state_mutex. */
void ferrydev_end_session(struct ferrydev *fdev)
{
	struct ferrydev_file *migf;

	mutex_lock(&fdev->lock);
	migf = fdev->migf;
	fdev->migf = NULL;
	if (migf)
		ferrydev_file_kill(migf);
	mutex_unlock(&fdev->lock);
	if (migf)
		fput(migf->filp);
}

/* The migration part of a reset. Called with state_mutex. */
static void finish_reset(struct ferrydev *fdev)
{
	if (!ferrydev_has(fdev, FERRYDEV_BREAK_X9))
		ferrydev_end_session(fdev);
	mutex_lock(&fdev->lock);
	if (fdev->mig_state != STATE(RUNNING)) {
		fdev->mig_state = STATE(RUNNING);
		fdev->mig_state_before = 0;
	}
	ferrydev_restart_pace(fdev);
	ferrydev_kick(fdev);
	mutex_unlock(&fdev->lock);
}

/*
 * Gives state_mutex back, and does the reset that came meanwhile. Whoever
 * resets must not wait for state_mutex: on real devices that is reached with
 * locks held that a SET takes inside of state_mutex.
 */
void ferrydev_state_unlock(struct ferrydev *fdev)
{
again:
	spin_lock(&fdev->reset_lock);
	if (fdev->deferred_reset) {
		fdev->deferred_reset = false;
		spin_unlock(&fdev->reset_lock);
		finish_reset(fdev);
		goto again;
	}
	mutex_unlock(&fdev->state_mutex);
	spin_unlock(&fdev->reset_lock);
}

/* libvfio-user's way: the migration state stays, and a stopped device refuses. */
static int reset_keeping_state(struct ferrydev *fdev)
{
	int rc = 0;

	mutex_lock(&fdev->lock);
	if (fdev->mig_state == STATE(STOP) || fdev->mig_state == STATE(STOP_COPY)) {
		rc = -EINVAL;
	} else {
		ferrydev_power_on(fdev);
		if (fdev->migf && fdev->migf->saver)
			ferrydev_saver_restart(fdev->migf->saver, fdev);
		if (fdev->migf && fdev->migf->loader)
			ferrydev_loader_restart(fdev->migf->loader);
	}
	mutex_unlock(&fdev->lock);
	return rc;
}

/*
 * VFIO_DEVICE_RESET and FLR. The device itself is reset here and now, and its
 * session is dead with it; the migration state follows, see
 * ferrydev_state_unlock().
 */
int ferrydev_reset(struct ferrydev *fdev)
{
	if (ferrydev_has(fdev, FERRYDEV_RESET_KEEPS_STATE) &&
	    fdev->mig_state != STATE(ERROR))
		return reset_keeping_state(fdev);

	mutex_lock(&fdev->lock);
	ferrydev_power_on(fdev);
	if (fdev->migf && !ferrydev_has(fdev, FERRYDEV_BREAK_X9))
		ferrydev_file_kill(fdev->migf);
	if (ferrydev_has(fdev, FERRYDEV_BREAK_R8))
		fdev->vdev.precopy_info_v2 = 0;
	fdev->size_object = false;
	mutex_unlock(&fdev->lock);
	ferrydev_pass(fdev, FERRYDEV_RESET_MS);

	spin_lock(&fdev->reset_lock);
	fdev->deferred_reset = true;
	if (!mutex_trylock(&fdev->state_mutex)) {
		spin_unlock(&fdev->reset_lock);
		return 0;
	}
	spin_unlock(&fdev->reset_lock);
	ferrydev_state_unlock(fdev);
	return 0;
}

/* How long the device takes for an arc. */
static u64 arc_ms(const struct ferrydev *fdev, unsigned int from, unsigned int to)
{
	const u64 *times = fdev->settings;
	u64 ms = ferrydev_quirk_arc_ms(fdev, to);

	switch (ARC(from, to)) {
	case ARC(STATE(RUNNING), STATE(PRE_COPY)):
	case ARC(STATE(RUNNING_P2P), STATE(PRE_COPY_P2P)):
		return ms + times[FERRYDEV_TO_PRECOPY_MS];
	case ARC(STATE(RUNNING), STATE(RUNNING_P2P)):
	case ARC(STATE(PRE_COPY), STATE(PRE_COPY_P2P)):
		return ms + times[FERRYDEV_TO_P2P_MS];
	case ARC(STATE(RUNNING_P2P), STATE(STOP)):
	case ARC(STATE(RUNNING), STATE(STOP)):
		return ms + times[FERRYDEV_TO_STOP_MS];
	case ARC(STATE(PRE_COPY_P2P), STATE(STOP_COPY)):
	case ARC(STATE(PRE_COPY), STATE(STOP_COPY)):
		return ms + times[FERRYDEV_TO_STOP_MS] + times[FERRYDEV_SAVE_MS];
	case ARC(STATE(STOP), STATE(STOP_COPY)):
		return ms + times[FERRYDEV_SAVE_MS];
	case ARC(STATE(STOP), STATE(RUNNING_P2P)):
	case ARC(STATE(STOP), STATE(RUNNING)):
	case ARC(STATE(RUNNING_P2P), STATE(RUNNING)):
	case ARC(STATE(PRE_COPY_P2P), STATE(PRE_COPY)):
		return ms + times[FERRYDEV_TO_RUNNING_MS];
	case ARC(STATE(RESUMING), STATE(STOP)):
		return ms + times[FERRYDEV_LOAD_MS];
	default:
		/* What only ends a session. */
		return ms;
	}
}

/* The new state is in force from here on. Under lock. */
static void enter(struct ferrydev *fdev, unsigned int to)
{
	fdev->mig_state_before = fdev->mig_state;
	fdev->mig_state = to;
	ferrydev_restart_pace(fdev);
	ferrydev_deliver(fdev);
	ferrydev_kick(fdev);
}

static void enter_error(struct ferrydev *fdev)
{
	ferrydev_end_session(fdev);
	mutex_lock(&fdev->lock);
	enter(fdev, STATE(ERROR));
	mutex_unlock(&fdev->lock);
}

/* Arcs that begin a session. The memory is taken before anything changes. */
static struct file *begin_session(struct ferrydev *fdev, unsigned int to)
{
	bool saving = to != STATE(RESUMING);
	struct ferrydev_file *migf;

	if (fdev->size_object)
		return ERR_PTR(-EBUSY);
	migf = ferrydev_file_new(fdev, saving, to != STATE(STOP_COPY));
	if (IS_ERR(migf))
		return ERR_CAST(migf);

	mutex_lock(&fdev->lock);
	if (saving)
		ferrydev_saver_begin(migf->saver, fdev, to != STATE(STOP_COPY));
	else
		/* What the device had is overwritten: its memory is free now. */
		ferrydev_state_power_on(fdev);
	if (fdev->migf)		/* only after break-X9 */
		ferrydev_file_kill(fdev->migf);
	swap(fdev->migf, migf);
	enter(fdev, to);
	mutex_unlock(&fdev->lock);
	if (migf)
		fput(migf->filp);

	/* One reference is the session's, the other the user's. */
	return get_file(fdev->migf->filp);
}

/* Arcs that end a session, and those without one. */
static struct file *end_and_enter(struct ferrydev *fdev, unsigned int to, bool ends)
{
	if (ends && !(ferrydev_has(fdev, FERRYDEV_BREAK_X4) && fdev->migf && fdev->migf->saver))
		ferrydev_end_session(fdev);
	mutex_lock(&fdev->lock);
	enter(fdev, to);
	if (ferrydev_is_active(fdev)) {
		/* A device that dwelt in STOP after it was loaded does no DMA. */
		if (ferrydev_has(fdev, FERRYDEV_STAY_IN_RESUMING) &&
		    fdev->loaded_in_set && fdev->loaded_in_set != fdev->sets)
			fdev->wedged = true;
		fdev->loaded_in_set = 0;
	}
	mutex_unlock(&fdev->lock);
	return NULL;
}

/* RESUMING -> STOP: the loaded data is judged and put in force. */
static struct file *finish_loading(struct ferrydev *fdev)
{
	struct ferrydev_file *migf = fdev->migf;
	int rc = -EINVAL;

	mutex_lock(&migf->lock);
	mutex_lock(&fdev->lock);
	/* A reset may have come before the lock. */
	if (!migf->dead)
		rc = ferrydev_loader_finish(migf->loader, fdev);
	if (ferrydev_has(fdev, FERRYDEV_BREAK_X8) ||
	    (ferrydev_has(fdev, FERRYDEV_BREAK_F14) && fdev->target != STATE(STOP)))
		rc = 0;
	mutex_unlock(&fdev->lock);
	mutex_unlock(&migf->lock);
	if (rc) {
		if (ferrydev_has(fdev, FERRYDEV_BREAK_F10))
			end_and_enter(fdev, STATE(RUNNING), true);
		else if (ferrydev_has(fdev, FERRYDEV_BAD_LOAD_ERRORS))
			enter_error(fdev);
		return ERR_PTR(-EINVAL);
	}
	fdev->loaded_in_set = fdev->sets;
	return end_and_enter(fdev, STATE(STOP), true);
}

/* PRE_COPY(_P2P) -> STOP_COPY: the session goes on with the rest. */
static struct file *continue_in_stop_copy(struct ferrydev *fdev)
{
	struct ferrydev_file *migf = fdev->migf;

	mutex_lock(&migf->lock);
	mutex_lock(&fdev->lock);
	if (ferrydev_has(fdev, FERRYDEV_GROW_AFTER_STOP))
		ferrydev_fill_bulk(fdev, DIV_ROUND_UP(fdev->quirks.arg[FERRYDEV_GROW_AFTER_STOP],
						      FERRYDEV_BLOCK_BYTES / 1024));
	/* First the state: what the guest writes from now on is refused. */
	enter(fdev, STATE(STOP_COPY));
	ferrydev_saver_stop_copy(migf->saver, fdev);
	mutex_unlock(&fdev->lock);
	mutex_unlock(&migf->lock);
	wake_up_interruptible(&migf->wait);
	return NULL;
}

/* Moves between PRE_COPY and PRE_COPY_P2P keep the session. */
static struct file *move_in_precopy(struct ferrydev *fdev, unsigned int to)
{
	struct ferrydev_file *migf = fdev->migf;
	bool back = to == STATE(PRE_COPY);

	end_and_enter(fdev, to, false);
	if (back && ferrydev_has(fdev, FERRYDEV_BREAK_F13)) {
		mutex_lock(&migf->lock);
		mutex_lock(&fdev->lock);
		ferrydev_saver_rebegin(migf->saver, fdev);
		mutex_unlock(&fdev->lock);
		mutex_unlock(&migf->lock);
	}
	if (!back && ferrydev_has(fdev, FERRYDEV_BREAK_X2))
		return get_file(migf->filp);
	return NULL;
}

static bool initial_left(struct ferrydev *fdev)
{
	bool left;

	if (!fdev->migf || !fdev->migf->saver)
		return false;
	mutex_lock(&fdev->migf->lock);
	mutex_lock(&fdev->lock);
	left = ferrydev_saver_initial_left(fdev->migf->saver);
	mutex_unlock(&fdev->lock);
	mutex_unlock(&fdev->migf->lock);
	return left;
}

/* Takes one arc. Answers a file, NULL, or an error with the state unchanged. */
static struct file *step(struct ferrydev *fdev, unsigned int to)
{
	unsigned int from = fdev->mig_state;
	bool to_error = false;
	int rc;

	ferrydev_pass_ms(arc_ms(fdev, from, to));
	mutex_lock(&fdev->lock);
	rc = ferrydev_quirk_arc_fails(fdev, from, to, &to_error);
	mutex_unlock(&fdev->lock);
	if (rc && to_error)
		enter_error(fdev);
	if (rc)
		return ERR_PTR(rc);
	if (ferrydev_has(fdev, FERRYDEV_BREAK_P8) && ferrydev_is_precopy(fdev) &&
	    fdev->target == STATE(STOP_COPY) && initial_left(fdev))
		return ERR_PTR(-EBUSY);

	switch (ARC(from, to)) {
	case ARC(STATE(RUNNING), STATE(PRE_COPY)):
	case ARC(STATE(RUNNING_P2P), STATE(PRE_COPY_P2P)):
	case ARC(STATE(STOP), STATE(STOP_COPY)):
	case ARC(STATE(STOP), STATE(RESUMING)):
		return begin_session(fdev, to);

	case ARC(STATE(PRE_COPY), STATE(PRE_COPY_P2P)):
	case ARC(STATE(PRE_COPY_P2P), STATE(PRE_COPY)):
		return move_in_precopy(fdev, to);

	case ARC(STATE(PRE_COPY), STATE(STOP_COPY)):
	case ARC(STATE(PRE_COPY_P2P), STATE(STOP_COPY)):
		return continue_in_stop_copy(fdev);

	case ARC(STATE(RESUMING), STATE(STOP)):
		return finish_loading(fdev);

	case ARC(STATE(PRE_COPY), STATE(RUNNING)):
	case ARC(STATE(PRE_COPY_P2P), STATE(RUNNING_P2P)):
	case ARC(STATE(STOP_COPY), STATE(STOP)):
		return end_and_enter(fdev, to, true);

	case ARC(STATE(RUNNING), STATE(RUNNING_P2P)):
	case ARC(STATE(RUNNING_P2P), STATE(RUNNING)):
	case ARC(STATE(RUNNING_P2P), STATE(STOP)):
	case ARC(STATE(STOP), STATE(RUNNING_P2P)):
	case ARC(STATE(RUNNING), STATE(STOP)):
	case ARC(STATE(STOP), STATE(RUNNING)):
		return end_and_enter(fdev, to, false);

	default:
		/* The core gives no other arcs. */
		WARN_ON(true);
		return ERR_PTR(-EINVAL);
	}
}

/* The next arc towards @target. */
int ferrydev_next_state(struct ferrydev *fdev, enum vfio_device_mig_state target,
			enum vfio_device_mig_state *next)
{
	/* The core warns when it is asked for a way out of ERROR. */
	if (fdev->mig_state == STATE(ERROR))
		return -EINVAL;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_D1))
		return ferrydev_quirk_next_state(fdev, target, next);
	return vfio_mig_get_next_state(&fdev->vdev, fdev->mig_state, target, next);
}

static struct file *ferrydev_set_state(struct vfio_device *vdev,
				       enum vfio_device_mig_state target)
{
	struct ferrydev *fdev = to_ferrydev(vdev);
	enum vfio_device_mig_state next;
	struct file *filp = NULL;
	unsigned int arcs = 0;
	int rc;

	mutex_lock(&fdev->state_mutex);
	fdev->sets++;
	fdev->target = target;
	if (ferrydev_quirk_answers_set(fdev, target, &rc)) {
		filp = ERR_PTR(rc);
		goto unlock;
	}
	while (fdev->mig_state != target) {
		rc = ferrydev_next_state(fdev, target, &next);
		if (rc) {
			filp = ERR_PTR(rc);
			break;
		}
		filp = step(fdev, next);
		if (IS_ERR(filp))
			break;
		/* An arc in the middle of a combination hands out nothing. */
		if (filp && fdev->mig_state != target) {
			fput(filp);
			filp = NULL;
		}
		arcs++;
	}
	/* A file where no session begins: after one arc, after several. */
	if (!filp && arcs == 1 && ferrydev_has(fdev, FERRYDEV_BREAK_X1) &&
	    !ferrydev_is_precopy(fdev) && ferrydev_is_active(fdev))
		filp = ferrydev_file_dead(fdev);
	if (!filp && arcs > 1 && ferrydev_has(fdev, FERRYDEV_BREAK_F12))
		filp = ferrydev_file_dead(fdev);
unlock:
	ferrydev_state_unlock(fdev);
	return filp;
}

static int ferrydev_get_state(struct vfio_device *vdev, enum vfio_device_mig_state *state)
{
	struct ferrydev *fdev = to_ferrydev(vdev);

	mutex_lock(&fdev->state_mutex);
	*state = ferrydev_quirk_shown_state(fdev);
	ferrydev_state_unlock(fdev);
	return 0;
}

/* What a session has left; without one, what a whole one would have. */
static u64 honest_data_size(struct ferrydev *fdev)
{
	struct ferrydev_file *migf = fdev->migf;
	u64 bytes;

	if (!migf || !migf->saver || !(ferrydev_is_precopy(fdev) ||
				       fdev->mig_state == STATE(STOP_COPY))) {
		mutex_lock(&fdev->lock);
		bytes = ferrydev_whole_stream_bytes(fdev);
		mutex_unlock(&fdev->lock);
		return bytes;
	}
	mutex_lock(&migf->lock);
	mutex_lock(&fdev->lock);
	bytes = ferrydev_saver_remaining(migf->saver, fdev);
	mutex_unlock(&fdev->lock);
	mutex_unlock(&migf->lock);
	return bytes;
}

static int claim_data_size(struct ferrydev *fdev, unsigned long *bytes)
{
	u32 claim = FERRYDEV_SIZE_HONEST;

	if (ferrydev_has(fdev, FERRYDEV_SIZE))
		claim = fdev->quirks.arg[FERRYDEV_SIZE];
	switch (claim) {
	case FERRYDEV_SIZE_GARBAGE:
		*bytes = GARBAGE_STOP_COPY;
		return 0;
	case FERRYDEV_SIZE_ZERO:
		*bytes = 0;
		return 0;
	case FERRYDEV_SIZE_UNDER:
		*bytes = honest_data_size(fdev) / 10;
		return 0;
	case FERRYDEV_SIZE_FAILS:
		return -EIO;
	default:
		*bytes = honest_data_size(fdev);
		return 0;
	}
}

static int ferrydev_get_data_size(struct vfio_device *vdev, unsigned long *bytes)
{
	struct ferrydev *fdev = to_ferrydev(vdev);
	int rc;

	/* The core asks every driver that migrates; older kernels said ENOTTY. */
	if (ferrydev_has(fdev, FERRYDEV_NO_DATA_SIZE))
		return -ENOTTY;
	mutex_lock(&fdev->state_mutex);
	ferrydev_pass(fdev, FERRYDEV_DATA_SIZE_MS);
	if (ferrydev_has(fdev, FERRYDEV_BREAK_Z1) && fdev->mig_state != STATE(STOP_COPY))
		rc = -EINVAL;
	else
		rc = claim_data_size(fdev, bytes);
	/* virtio frees the object that it makes for the answer. */
	if (ferrydev_has(fdev, FERRYDEV_BREAK_Z4) && fdev->mig_state == STATE(RUNNING))
		fdev->size_object = true;
	ferrydev_state_unlock(fdev);
	return rc;
}

const struct vfio_migration_ops ferrydev_migration_ops = {
	.migration_set_state = ferrydev_set_state,
	.migration_get_state = ferrydev_get_state,
	.migration_get_data_size = ferrydev_get_data_size,
};
