//! The rules in order, each within its limit.
//!
//! ```text
//!   run ── job: rule, limit ──> thread that owns the device ── calls ──> device
//!    │ <── came of it ─────────   │  way back to RUNNING
//!    │ <── usable, or why not ──  ┘
//!    └── neither in time: the rule failed in CALL; the rest is skipped while the call hangs
//! ```
//!
//! A kernel call that does not return cannot be taken back, so the thread is left alone with it.

use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use crate::context::{Context, Stop, Watch, call_grace};
use crate::guest::ReinitWrite;
use crate::rule::{Rule, Testing};
use crate::rules;
use crate::selection::Selection;
use crate::subject::{About, Subject};
use crate::verdict::{Report, RuleReport, Verdict};

/// What a rule may take beyond its limit before it is given up: calls with a deadline return by themselves.
const SLACK: Duration = Duration::from_secs(1);
/// How often it is told that a rule is under way.
const TICK: Duration = Duration::from_millis(100);
/// What opening the device anew may take.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// What is run, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Only these; all if `None`.
    pub only: Option<Selection>,
    /// Without these.
    pub skip: Option<Selection>,
    /// Destructive rules too.
    pub destructive: bool,
    /// The most bytes that are read of one stream.
    pub stream_max_bytes: u64,
    /// Every rule's limit, instead of its own.
    pub time_limit: Option<Duration>,
    /// What the way back to RUNNING may take, and a call that overran its rule.
    pub restore_limit: Duration,
    /// How to make the device reconfigure itself.
    pub reinit_write: Option<ReinitWrite>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            only: None,
            skip: None,
            destructive: false,
            stream_max_bytes: 512 << 20,
            time_limit: None,
            restore_limit: Duration::from_secs(10),
            reinit_write: None,
        }
    }
}

impl Options {
    /// The rules that are run, in the catalogue's order.
    pub fn selected(&self) -> Vec<&'static Rule> {
        let wanted = |rule: &&Rule| {
            self.only.as_ref().is_none_or(|only| only.contains(rule))
                && !self.skip.as_ref().is_some_and(|skip| skip.contains(rule))
        };
        rules::all().into_iter().filter(wanted).collect()
    }
}

/// What goes on, for whoever watches.
#[derive(Clone, Copy, Debug)]
pub enum Progress<'a> {
    /// A rule begins; so many of so many are done.
    Begins(&'static Rule, usize, usize),
    /// A rule is under way still; told every so often.
    Waiting,
    /// A rule is done.
    Done(&'a RuleReport),
}

enum Job {
    Rule(fn(&mut Context) -> Result<(), Stop>, Duration),
    Prepare,
    Restore,
}

enum Came {
    Of(Result<(), Stop>),
    Restored(Result<(), String>),
}

/// Tests `subject`. Returns also where the device does not. Where `observe` says to break, the rule under way
/// ends, the device is brought back, and the rest is skipped.
pub fn run(
    subject: Box<dyn Subject>,
    options: &Options,
    mut observe: impl FnMut(Progress<'_>) -> ControlFlow<()>,
) -> Report {
    let about = subject.about();
    let selected = options.selected();
    let mut bench = Bench::start(subject, options);
    let mut reports: Vec<RuleReport> = Vec::with_capacity(selected.len());
    let total = selected.len();
    for rule in selected {
        bench.stopped |= observe(Progress::Begins(rule, reports.len(), total)).is_break();
        let start = Instant::now();
        let verdict = match (&bench.unusable, rule.testing) {
            (_, Testing::Untestable { why }) => Verdict::Untestable { why: why.into() },
            (_, Testing::Checked { destructive: true, .. }) if !options.destructive => skipped(
                "destructive: it gives the device data that is no device's state (--destructive)",
            ),
            (Some(why), _) => skipped(why.clone()),
            (None, _) if bench.stopped => skipped("interrupted"),
            (None, Testing::Checked { check, limit_s, .. }) => {
                let limit = Duration::from_secs(limit_s.into());
                let limit = options.time_limit.unwrap_or(limit);
                bench.test(rule, check, limit, &mut observe)
            }
        };
        let took_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        let report = RuleReport::new(rule, verdict, took_ms);
        bench.stopped |= observe(Progress::Done(&report)).is_break();
        reports.push(report);
    }
    bench.end(about, reports)
}

fn skipped(why: impl Into<String>) -> Verdict {
    Verdict::Skipped { why: why.into() }
}

/// The device's thread, and what is known of the device.
struct Bench {
    jobs: Sender<Job>,
    came: Receiver<Came>,
    watch: Watch,
    restore_limit: Duration,
    unusable: Option<String>,
    /// Whoever watches has seen enough.
    stopped: bool,
}

impl Bench {
    fn start(subject: Box<dyn Subject>, options: &Options) -> Self {
        let (jobs, taken) = channel();
        let (told, came) = channel();
        let watch = Watch::default();
        let context = Context::new(subject, watch.clone(), options);
        let thread = std::thread::Builder::new().name("conformance".into());
        let restore_limit = options.restore_limit;
        let started = thread.spawn(move || serve(context, &taken, &told, restore_limit));
        let mut bench = Self { jobs, came, watch, restore_limit, unusable: None, stopped: false };
        if let Err(error) = started {
            bench.unusable = Some(format!("no thread for the device: {error}"));
        } else {
            bench.come_back(Job::Prepare, "before the first rule");
        }
        bench
    }

    fn test(
        &mut self,
        rule: &Rule,
        check: fn(&mut Context) -> Result<(), Stop>,
        limit: Duration,
        observe: &mut impl FnMut(Progress<'_>) -> ControlFlow<()>,
    ) -> Verdict {
        // A thread that ended answers nothing either.
        let _ = self.jobs.send(Job::Rule(check, limit));
        let verdict = match self.wait(limit + call_grace(limit) + SLACK, observe) {
            Ok(Came::Of(Ok(()))) => Verdict::Pass,
            Ok(Came::Of(Err(stop))) => verdict_of(stop),
            Ok(Came::Restored(_)) => skipped("the device's thread is out of step"),
            Err(RecvTimeoutError::Disconnected) => self.lost(rule),
            Err(RecvTimeoutError::Timeout) => {
                let (call, since) = self.call_now();
                let seconds = limit.as_secs_f32().min(since.as_secs_f32().ceil());
                let verdict = Verdict::Fail {
                    expected: format!("{call} returns"),
                    got: format!("did not return within {seconds} s: {call}"),
                };
                // A call that is merely slow ends the rule when it comes back.
                if self.came.recv_timeout(self.restore_limit).is_err() {
                    let (call, since) = self.call_now();
                    self.unusable = Some(format!(
                        "the device is stuck in {call} for {} s, since rule {}",
                        since.as_secs(),
                        rule.id
                    ));
                }
                verdict
            }
        };
        if self.unusable.is_none() {
            self.come_back(Job::Restore, &format!("after rule {}", rule.id));
        }
        verdict
    }

    /// Waits for what comes, and tells that it waits.
    fn wait(
        &mut self,
        limit: Duration,
        observe: &mut impl FnMut(Progress<'_>) -> ControlFlow<()>,
    ) -> Result<Came, RecvTimeoutError> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.came.recv_timeout(left.min(TICK)) {
                Err(RecvTimeoutError::Timeout) if left > TICK => {
                    self.stopped |= observe(Progress::Waiting).is_break();
                }
                result => return result,
            }
        }
    }

    fn come_back(&mut self, job: Job, when: &str) {
        let _ = self.jobs.send(job);
        // A second try over a new handle, which takes its time too.
        let restored = self.came.recv_timeout(self.restore_limit * 2 + OPEN_LIMIT * 2 + SLACK);
        self.unusable = match restored {
            Ok(Came::Restored(Ok(()))) => None,
            Ok(Came::Restored(Err(why))) => {
                Some(format!("the device could not be brought to RUNNING {when}: {why}"))
            }
            Ok(Came::Of(_)) | Err(RecvTimeoutError::Disconnected) => {
                Some(format!("the device's thread ended {when}"))
            }
            Err(RecvTimeoutError::Timeout) => {
                let (call, since) = self.call_now();
                Some(format!("the device is stuck in {call} for {} s, {when}", since.as_secs()))
            }
        };
    }

    fn lost(&mut self, rule: &Rule) -> Verdict {
        let why = format!("the device's thread ended in rule {}", rule.id);
        self.unusable = Some(why.clone());
        skipped(why)
    }

    fn call_now(&self) -> (String, Duration) {
        self.watch.now().unwrap_or_else(|| ("the rule".into(), Duration::ZERO))
    }

    fn end(self, about: About, reports: Vec<RuleReport>) -> Report {
        Report::new(about, reports, self.unusable)
    }
}

fn verdict_of(stop: Stop) -> Verdict {
    match stop {
        Stop::Fail { expected, got } => Verdict::Fail { expected, got },
        Stop::NotApplicable(why) => Verdict::NotApplicable { why },
        Stop::Skipped(why) => Verdict::Skipped { why },
    }
}

fn serve(mut context: Context, jobs: &Receiver<Job>, told: &Sender<Came>, restore_limit: Duration) {
    while let Ok(job) = jobs.recv() {
        let came = match job {
            Job::Rule(check, limit) => {
                context.begin(limit);
                Came::Of(check(&mut context))
            }
            Job::Prepare => Came::Restored(context.prepare(restore_limit)),
            Job::Restore => Came::Restored(context.restore(restore_limit)),
        };
        if told.send(came).is_err() {
            return;
        }
    }
}
