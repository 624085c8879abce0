//! Mistakes planted in real runs, and what is said about them.
//!
//! Each mistake is computed by loops of its own, not by those of the hypotheses: the two agree only if they mean the same.

mod any;
mod attention;
mod elementwise;
mod experts;
mod linear;
mod norm;
mod plant;
mod rope;

use apr_audit::{Audit, Diagnosis};
use apr_model::Site;

/// The first fault is at `site`, and its mistake is called `name`.
#[track_caller]
fn is_called(name: &str, site: Site, (audit, diagnoses): &(Audit, Vec<Diagnosis>)) {
    let first = audit.faults().next().map(|fault| fault.site);
    assert_eq!(first, Some(site), "{}", audit.verdict);
    let diagnosis = &diagnoses[0];
    let Some(finding) = &diagnosis.finding else { panic!("{name}: {diagnosis}") };
    assert_eq!(finding.hypothesis, name, "{diagnosis}");
    assert!(finding.excess_after <= 1.0 && finding.excess_before > 1.0, "{finding:?}");
}

/// The same, and no other mistake fits.
#[track_caller]
fn is_only(name: &str, site: Site, found: &(Audit, Vec<Diagnosis>)) {
    is_called(name, site, found);
    let others: Vec<_> = found.1[0].also_fits.iter().map(|other| other.hypothesis).collect();
    assert!(others.is_empty(), "{name} and {others:?}");
}

fn sentence(found: &(Audit, Vec<Diagnosis>)) -> &str {
    &found.1[0].finding.as_ref().expect("was found").sentence
}
