//! Cutting a run that breaks a promise down to what is needed for it.

use std::path::Path;

use crate::fleet::{Cut, Job, Report};

/// Runs that are spent on cutting one down.
const ATTEMPTS: usize = 120;

/// The shortest run that was found which breaks the same promise, and its report.
pub fn shrink(
    program: &Path,
    job: Job,
    report: Report,
    mut progress: impl FnMut(usize),
) -> (Job, Report) {
    let Some((promise, _)) = report.violation.clone() else { return (job, report) };
    let mut best = (job, report);
    let mut attempts = 0;
    let plan = crate::plan::Plan::of(best.0.seed);
    let (faults, actors) = (plan.faults.len(), plan.actors.len());
    let mut attempt = |best: &mut (Job, Report), cut: Cut| -> bool {
        attempts += 1;
        progress(attempts);
        let job = Job { cut, ..best.0.clone() };
        let Ok(report) = job.run(program) else { return false };
        let is_same = report.violation.as_ref().is_some_and(|(broken, _)| *broken == promise);
        if is_same {
            *best = (job, report);
        }
        is_same
    };
    // Large pieces first, then smaller ones; once more while that still takes something away.
    let mut piece = faults.max(1).div_ceil(2);
    let mut left = ATTEMPTS;
    loop {
        let mut found = false;
        let mut start = 0;
        while start < faults && left > 0 {
            let end = (start + piece).min(faults);
            let mut cut = best.0.cut.clone();
            let before = cut.faults.len();
            cut.faults.extend(start..end);
            if cut.faults.len() > before {
                left -= 1;
                found |= attempt(&mut best, cut);
            }
            start = end;
        }
        if piece == 1 {
            for actor in 0..actors {
                let mut cut = best.0.cut.clone();
                if left > 0 && cut.actors.insert(actor) {
                    left -= 1;
                    found |= attempt(&mut best, cut);
                }
            }
            if !found || left == 0 {
                return best;
            }
        }
        piece = piece.div_ceil(2);
    }
}
