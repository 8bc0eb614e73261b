//! The rules that keep the promises, as a table.
//!
//! Every entry is on. A check that claims to cover the invariants shows that each of them is needed: it
//! explores the machines with one entry off and must find the harm.

/// Which rules hold. [`Default`] is all of them; nothing but a check has a use for less.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rules {
    /// Destination: no Commit is obeyed once the window has ended (invariant 1).
    pub commit_within_window: bool,
    /// Destination: a Commit counts on the newest connection alone (invariant 6).
    pub commit_on_newest_connection: bool,
    /// Destination: a Commit counts for the attempt that is prepared (invariant 6).
    pub commit_of_this_attempt: bool,
    /// Source: doubt is ended by a recorded answer or the operator, not by words without a record
    /// (invariant 1).
    pub doubt_ends_by_record: bool,
    /// Source: without force the operator waits for the end of the window (invariant 1).
    pub resolve_after_window: bool,
    /// Source: in doubt, every new connection is asked (invariant 2).
    pub query_in_doubt: bool,
    /// Source: one whose guest died with its process does not ask, since the question alone makes a
    /// prepared destination say `never` (invariant 2).
    pub without_guest_no_query: bool,
    /// Destination: one that recorded `running` and lost the guest with its process does not say Running:
    /// the source may hold the only copy (invariant 2).
    pub lost_guest_is_unknown: bool,
    /// Destination: what could not be started is kept until the source asks (invariant 2).
    pub failed_start_is_kept: bool,
    /// Destination: a Commit after the window is not answered by `never` before the source asks
    /// (invariant 2).
    pub late_commit_is_kept: bool,
    /// Source: pages sent in an attempt that is taken back are dirty again (invariant 3).
    pub restore_dirty: bool,
    /// Source: the last sync comes after every device has stopped (invariant 3).
    pub final_sync: bool,
    /// Source: known unread initial data does not go into STOP_COPY (invariant 5).
    pub no_unread_into_stop_copy: bool,
    /// Source: only questions asked with the vCPUs stopped settle the look (invariant 5).
    pub look_asks_anew: bool,
    /// Source: an acknowledgement counts for its own session (invariant 6).
    pub acks_name_sessions: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            commit_within_window: true,
            commit_on_newest_connection: true,
            commit_of_this_attempt: true,
            doubt_ends_by_record: true,
            resolve_after_window: true,
            query_in_doubt: true,
            without_guest_no_query: true,
            lost_guest_is_unknown: true,
            failed_start_is_kept: true,
            late_commit_is_kept: true,
            restore_dirty: true,
            final_sync: true,
            no_unread_into_stop_copy: true,
            look_asks_anew: true,
            acks_name_sessions: true,
        }
    }
}
