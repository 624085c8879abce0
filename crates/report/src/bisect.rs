//! Bisections as text. Their JSON is the [`Bisect`] itself.
//!
//! In the order of the evidence: the prompt, the files, the stages of each side, what the difference is made of, what
//! putting things right did; and what follows from it last.

use std::fmt::Write;

use apr_audit::{Audit, Bisect, BisectVerdict, Graft, Harm, Parts, PromptDifference, SideReport};
use apr_diff::CheckpointComparison;

pub use crate::audit::Options;
use crate::{
    audit::{Paint, faults, map},
    diff::{listed, section, tokens},
    table::{lines, magnitude, plural, table},
};

/// A bisection.
pub fn text(found: &Bisect, options: &Options) -> String {
    let paint = Paint(options.colour);
    let mut out = String::new();
    for (letter, what, side) in sides(found) {
        let _ = writeln!(out, "{letter}  {} on {} ({what})", side.path, side.engine);
    }
    out += &section("prompt", &prompt(&found.prompt));
    if let Some(files) = &found.files {
        out += &section("files", &differences(files));
    }
    let replays = sides(found)
        .into_iter()
        .filter_map(|(letter, _, side)| Some((letter.to_owned(), side.audit.as_ref()?, side)));
    let foreign = found.reference_with_our_weights.as_ref();
    let heading = "B with A's weights, give or take their rounding";
    let foreign = foreign.map(|audit| (heading.to_owned(), audit, &found.b));
    for (name, audit, side) in replays.chain(foreign) {
        let _ = writeln!(out, "\nstages of {name}: {}", paint.verdict(&audit.verdict.to_string()));
        if audit.faults().next().is_some() {
            out += &paint.signs(&map(audit));
            out += &faults(audit, &side.diagnoses, paint);
        }
    }
    if found.reference_with_our_weights.is_some() {
        out += "(the file of B is not given: --reference-model FILE tells what the weights do)\n";
    }
    out += "\n";
    out += &parts(&found.parts, options.limit);
    if let Some(logits) = found.comparison.stages.iter().find_map(|stage| stage.logits.as_ref()) {
        out += "\n";
        out += &tokens(logits);
    }
    out += &harm(&found.harm, options.limit);
    out += &section("put right and run again", &grafts(&found.grafts));
    out += &section("not compared, and not scored", &listed(&found.comparison.not_compared));
    out += "\n";
    out + &paint.verdict(&verdict(found)) + "\n"
}

/// Both sides: letter, role and report.
pub(crate) fn sides(found: &Bisect) -> [(&'static str, &'static str, &SideReport); 2] {
    [("A", "under test", &found.a), ("B", "the reference", &found.b)]
}

/// Differences before the first number, in sentences.
pub(crate) fn prompt(differences: &[PromptDifference]) -> Vec<String> {
    let token = |token: &Option<(u32, String)>| match token {
        Some((id, text)) => format!("{id} {text:?}"),
        None => "none".to_owned(),
    };
    let sentence = |difference: &PromptDifference| match difference {
        PromptDifference::Tokens { text, at, ours, theirs } => format!(
            "{text:?} gives other tokens from index {at} on: {} in A, {} in B",
            token(ours),
            token(theirs)
        ),
        PromptDifference::ChatTemplate { at } => {
            format!(
                "the chat templates differ from character {at} on; this run used none of either's text"
            )
        }
        PromptDifference::EndOfText { ours, theirs } => {
            format!("the tokens that end a text differ: {ours:?} in A, {theirs:?} in B")
        }
    };
    differences.iter().map(sentence).collect()
}

/// How the files differ, in lines: config first, then what rounding does not explain.
pub(crate) fn differences(files: &CheckpointComparison) -> Vec<String> {
    const NAMED: usize = 12;
    let mut out = Vec::new();
    if let Some(config) = &files.config {
        let key = |d: &apr_diff::ConfigDifference| {
            format!("config: {} is {} in A and {} in B", d.key, d.a, d.b)
        };
        out.extend(config.differences.iter().map(key));
    }
    let wrong: Vec<_> = files.tensors.iter().filter(|tensor| !tensor.explained).collect();
    for tensor in wrong.iter().take(NAMED) {
        let what = match (&tensor.relation, &tensor.damage) {
            (Some(relation), _) => relation.to_string(),
            (None, Some(damage)) => damage.to_string(),
            (None, None) => "differs by more than its types explain".to_owned(),
        };
        out.push(format!("{}: {what}", tensor.name));
    }
    if wrong.len() > NAMED {
        out.push(format!("and {} more tensors", wrong.len() - NAMED));
    }
    let rounded = files.tensors.iter().filter(|t| t.explained && !t.within).count();
    let same = files.tensors.len() - wrong.len() - rounded;
    out.push(format!(
        "{}: {same} the same, {rounded} explained by their types' rounding, {} not",
        plural(files.tensors.len(), "tensor"),
        wrong.len()
    ));
    out
}

/// The stages of a bisection with most of what is not arithmetic, the worst first.
pub(crate) fn worst_parts(parts: &[Parts]) -> Vec<&Parts> {
    let mut worst: Vec<&Parts> = parts.iter().collect();
    let own =
        |part: &Parts| part.weights.unwrap_or(0.0).hypot(part.unexplained).max(part.arithmetic);
    worst.sort_by(|a, b| own(b).total_cmp(&own(a)));
    worst
}

fn parts(parts: &[Parts], limit: usize) -> String {
    if parts.is_empty() {
        return String::new();
    }
    let mut t = table(&["stage", "arithmetic", "weights", "unexplained", "bound", "cumulative"]);
    for part in worst_parts(parts).into_iter().take(limit) {
        t.add_row([
            part.site.to_string(),
            magnitude(part.arithmetic),
            optional(part.weights),
            magnitude(part.unexplained),
            magnitude(part.bound),
            optional(part.cumulative),
        ]);
    }
    let mut out = lines(&t);
    if parts.len() > limit {
        let _ = writeln!(out, "and {}, in the JSON", plural(parts.len() - limit, "smaller one"));
    }
    out + "(what each stage adds by itself: by its arithmetic's rounding, by weights that differ from B's, by neither; and where\n \
           all earlier stages' errors have led; all relative L2)\n"
}

pub(crate) fn optional(x: Option<f64>) -> String {
    x.map_or("-".to_owned(), magnitude)
}

fn harm(harm: &[Harm], limit: usize) -> String {
    let Some(first) = harm.first() else { return String::new() };
    let mut t = table(&["with B's", "stored as", "logits", "KL"]);
    for h in harm.iter().take(limit) {
        t.add_row([
            h.tensor.clone(),
            h.dtype.clone(),
            magnitude(h.error_without),
            optional(h.kl_without),
        ]);
    }
    format!(
        "\nwhich tensors hurt the logits most: their relative L2 is {} and KL {} nats as they are, and with one tensor of B's:\n{}",
        magnitude(first.error),
        optional(first.kl),
        lines(&t)
    )
}

/// What putting stages right did, in sentences.
pub(crate) fn grafts(grafts: &[Graft]) -> Vec<String> {
    let names = |sites: &[apr_model::Site]| {
        crate::words::join(&sites.iter().map(|site| site.to_string()).collect::<Vec<_>>())
    };
    let sentence = |graft: &Graft| {
        let mut out = format!("{}: ", names(&graft.sites));
        out += &match graft.remaining.is_empty() {
            true => "nothing else is wrong".to_owned(),
            false => format!("still wrong: {}", names(&graft.remaining)),
        };
        if let (Some(before), Some(after)) = (graft.logits_before, graft.logits_after) {
            let _ = write!(
                out,
                "; the logits' distance from B goes from {} to {}",
                magnitude(before),
                magnitude(after)
            );
        }
        if let Some([before, after, rows]) = graft.favourites {
            let _ = write!(
                out,
                "; the favourite token agrees in {after} of {rows} rows instead of {before}"
            );
        }
        out
    };
    grafts.iter().map(sentence).collect()
}

/// How many things that are wrong are told after the first.
const ALSO: usize = 8;

/// What follows, in words to act on; the first word is the verdict.
pub(crate) fn verdict(found: &Bisect) -> String {
    let BisectVerdict::Diverges { blames } = &found.verdict else {
        return found.verdict.to_string();
    };
    let lines: Vec<String> =
        blames.iter().map(|blame| format!("{}: {}", blame.culprit.name(), blame.what)).collect();
    match &lines[..] {
        [] => "DIVERGES".to_owned(),
        [only] => format!("DIVERGES: {only}"),
        [first, rest @ ..] => {
            let mut out = format!("DIVERGES: {first}\nalso");
            for line in rest.iter().take(ALSO) {
                let _ = write!(out, "\n- {line}");
            }
            if rest.len() > ALSO {
                let _ =
                    write!(out, "\n- {}, in the JSON", plural(rest.len() - ALSO, "more finding"));
            }
            out
        }
    }
}

/// How the audit of one side is headed.
pub(crate) fn audited<'a>(
    found: &'a Bisect,
) -> Vec<(&'static str, &'static str, &'a Audit, &'a SideReport)> {
    let with = |id, name, audit: &'a Option<Audit>, side| {
        audit.as_ref().map(|audit| (id, name, audit, side))
    };
    [
        with("a-", " of A", &found.a.audit, &found.a),
        with("b-", " of B", &found.b.audit, &found.b),
        with("foreign-", " of B, with A's weights", &found.reference_with_our_weights, &found.b),
    ]
    .into_iter()
    .flatten()
    .collect()
}
