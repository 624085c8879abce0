//! Runs that must agree bit by bit.

use apr_model::{LogitRows, Model, Plan, Site, Stage, TapSet, Unobserved};

use crate::{
    Break, Check, Factory, Note, Outcome, Place, Way,
    compare::{Compare, Fetch, Glance},
    outcome::Verdict,
    rows::bits,
    script::{Act, play, reads},
    session::Session,
};

/// What came of several runs.
#[derive(Debug, Default)]
struct Tally {
    runs: usize,
    rows: usize,
    breaks: Vec<Break>,
    /// Runs that could not be compared, and why.
    missed: Vec<String>,
}

/// A run, in words, on the model as asked for.
type Run = (String, Vec<Act>);

impl<F: Factory> Session<'_, F> {
    pub(crate) fn plan(&self) -> Result<Verdict, Outcome> {
        let plan = self.model()?.plan();
        let ways = self.ways(self.all_threads(), self.factory.isas());
        if ways.is_empty() {
            return Err(Outcome::not_applicable("this backend is built in one way only"));
        }
        let mut tally = Tally::default();
        for (name, way) in ways {
            match self.build(way) {
                Ok(model) => {
                    tally.runs += 1;
                    let what = plan_difference(plan, model.plan());
                    let what = what.map(|what| format!("with {name}: {what}"));
                    tally.breaks.extend(what.map(|what| Break::Other { what }));
                }
                Err(error) => tally.missed.push(format!("{name}: {error}")),
            }
        }
        let (ops, runs) = (plan.ops().len(), tally.runs);
        Ok(tally.verdict(format!("{ops} ops, planned in {} ways", 1 + runs)))
    }

    pub(crate) fn finite_values(&self) -> Result<Verdict, Outcome> {
        self.model()?;
        let whole = self.whole();
        self.begin(Check::FiniteValues, &[&whole]);
        let baseline = self.baseline(&whole).map_err(Outcome::broken)?;
        let breaks = baseline.not_finite.to_break().into_iter().collect();
        let tokens = self.texts.prompt.len();
        Ok(Verdict::new(breaks, format!("{} sites of {tokens} positions", baseline.sites())))
    }

    pub(crate) fn repeat(&self) -> Result<Verdict, Outcome> {
        self.same(
            Check::Repeat,
            vec![("the same run again".to_owned(), self.whole())],
            LogitRows::All,
        )
    }

    pub(crate) fn logit_rows(&self) -> Result<Verdict, Outcome> {
        let run = ("logits asked for of the last row only".to_owned(), self.whole());
        self.same(Check::LogitRows, vec![run], LogitRows::Last)
    }

    pub(crate) fn chunks(&self) -> Result<Verdict, Outcome> {
        let n = self.several()?;
        let sizes: &[usize] = if self.options.quick { &[3] } else { &[3, 7, 16] };
        let mut sizes: Vec<usize> = sizes.iter().copied().filter(|&size| size < n).collect();
        if sizes.is_empty() {
            sizes.push(1);
        }
        let run = |size| (format!("chunks of {size}"), self.texts.chunks(size));
        self.as_at_once(Check::Chunks, sizes.into_iter().map(run).collect())
    }

    pub(crate) fn decode(&self) -> Result<Verdict, Outcome> {
        self.several()?;
        self.as_at_once(Check::Decode, vec![("token by token".to_owned(), self.texts.chunks(1))])
    }

    pub(crate) fn interleaved(&self) -> Result<Verdict, Outcome> {
        self.after_half(Check::Interleaved, "another sequence in between", |first, rest| {
            vec![Act::Other(first), Act::Read(first), Act::Other(rest), Act::Read(rest)]
        })
    }

    pub(crate) fn snapshot(&self) -> Result<Verdict, Outcome> {
        self.after_half(Check::Snapshot, "from a copy of the cache", |first, rest| {
            vec![Act::Read(first), Act::Copy, Act::Stray(rest), Act::Resume, Act::Read(rest)]
        })
    }

    pub(crate) fn rewind(&self) -> Result<Verdict, Outcome> {
        self.after_half(Check::Rewind, "after going astray and back", |first, rest| {
            vec![Act::Read(first), Act::Stray(rest), Act::Rewind(first), Act::Read(rest)]
        })
    }

    pub(crate) fn threads(&self) -> Result<Verdict, Outcome> {
        let counts = self.all_threads();
        self.built_otherwise(Check::Threads, self.ways(counts, Vec::new()))
    }

    pub(crate) fn isa(&self) -> Result<Verdict, Outcome> {
        self.built_otherwise(Check::Isa, self.ways(Vec::new(), self.factory.isas()))
    }

    pub(crate) fn traced(&self) -> Result<Verdict, Outcome> {
        let model = self.model()?;
        let whole = self.whole();
        self.begin(Check::Traced, &[&whole]);
        let observed = self.baseline(&whole).map_err(Outcome::not_measured)?;
        let run = |taps| play(model, &self.texts, &whole, LogitRows::All, &mut Glance(taps));
        let unobserved = play(model, &self.texts, &whole, LogitRows::All, &mut Unobserved)
            .map_err(Outcome::not_measured)?;
        let mut breaks = Vec::new();
        if let Some(together) = self.changed_logits(None, &unobserved, &observed.logits) {
            let alone = |&site: &Site| {
                let observed = run(TapSet::from_iter([site])).ok()?;
                self.changed_logits(Some(site), &unobserved, &observed)
            };
            breaks.push(model.plan().sites().iter().find_map(alone).unwrap_or(together));
        }
        let rows = self.texts.prompt.len();
        Ok(Verdict::new(
            breaks,
            format!("the logits of {rows} positions, {} sites observed", observed.sites()),
        ))
    }

    /// The first of the logits that `observed` has otherwise than `unobserved`.
    fn changed_logits(
        &self,
        site: Option<Site>,
        unobserved: &[f32],
        observed: &[f32],
    ) -> Option<Break> {
        let differs =
            |(_, (a, b)): &(usize, (&f32, &f32))| bits((**a).into()) != bits((**b).into());
        let mut wrong = unobserved.iter().zip(observed).enumerate().filter(differs);
        let (index, (&expected, &found)) = wrong.next()?;
        let vocab = (unobserved.len() / self.texts.prompt.len()).max(1);
        let at = Place {
            site: Site::whole(Stage::LmHead),
            position: index / vocab,
            head: None,
            slot: None,
            channel: Some(index % vocab),
            key: None,
        };
        let (expected, found) = (expected.into(), found.into());
        Some(Break::Looking {
            observed: site,
            at,
            expected,
            found,
            elements: 1 + wrong.count() as u64,
        })
    }

    /// Runs that read the prompt in other steps than at once, and must agree with that.
    fn as_at_once(&self, check: Check, runs: Vec<Run>) -> Result<Verdict, Outcome> {
        self.compared(check, &runs, LogitRows::All, |_| self.whole())
    }

    /// Runs that must agree with the same steps and nothing else between them: one thing is changed at a time.
    fn same(&self, check: Check, runs: Vec<Run>, logits: LogitRows) -> Result<Verdict, Outcome> {
        self.compared(check, &runs, logits, reads)
    }

    /// A run that reads half the prompt, does something, and reads the rest.
    fn after_half(
        &self,
        check: Check,
        name: &str,
        acts: impl Fn(usize, usize) -> Vec<Act>,
    ) -> Result<Verdict, Outcome> {
        let n = self.several()?;
        let first = n.div_ceil(2);
        self.same(check, vec![(name.to_owned(), acts(first, n - first))], LogitRows::All)
    }

    fn compared(
        &self,
        check: Check,
        runs: &[Run],
        logits: LogitRows,
        with: impl Fn(&[Act]) -> Vec<Act>,
    ) -> Result<Verdict, Outcome> {
        let model = self.model()?;
        self.begin(check, &runs.iter().map(|(_, acts)| &acts[..]).collect::<Vec<_>>());
        let mut tally = Tally::default();
        for (name, acts) in runs {
            self.agree(model, name, acts, &with(acts), logits, &mut tally)?;
        }
        let looked_at = tally.looked_at();
        Ok(tally.verdict(looked_at))
    }

    /// Runs on backends that are built in other ways.
    fn built_otherwise(&self, check: Check, ways: Vec<(String, Way)>) -> Result<Verdict, Outcome> {
        self.model()?;
        if ways.is_empty() {
            return Err(Outcome::not_applicable("this backend has no such choice"));
        }
        let acts = self.texts.mixed();
        self.begin(check, &vec![&acts[..]; ways.len()]);
        let mut tally = Tally::default();
        for (name, way) in ways {
            match self.build(way) {
                Ok(model) => self.agree(&model, &name, &acts, &acts, LogitRows::All, &mut tally)?,
                Err(error) => tally.missed.push(format!("{name}: {error}")),
            }
        }
        let looked_at = tally.looked_at();
        Ok(tally.verdict(looked_at))
    }

    /// Compares the run of `acts` on `model` with the run of `baseline` on the model as asked for.
    fn agree(
        &self,
        model: &Model<F::Backend>,
        name: &str,
        acts: &[Act],
        baseline: &[Act],
        logits: LogitRows,
        tally: &mut Tally,
    ) -> Result<(), Outcome> {
        let asked = self.model()?;
        let expected = self.baseline(baseline).map_err(Outcome::not_measured)?;
        let mut compare = Compare::new(&expected, self.watch);
        let run = play(model, &self.texts, acts, logits, &mut compare);
        let (rows, all) = compare.rows();
        tally.runs += 1;
        tally.rows += rows;
        if let Some(difference) = compare.difference() {
            let mut again = Fetch::new(&expected, difference.site);
            let repeated = play(asked, &self.texts, baseline, LogitRows::All, &mut again);
            repeated.map_err(Outcome::not_measured)?;
            tally.breaks.push(difference.to_break(name, &expected, &again));
        } else if let Err(error) = run {
            tally.breaks.push(Break::Other { what: format!("{name}: {error}") });
        } else if rows < all || rows == 0 {
            tally.missed.push(format!("{name}: only {rows} of {all} rows could be compared"));
        }
        Ok(())
    }

    /// Tells who waits how much there is to do.
    pub(crate) fn begin(&self, check: Check, runs: &[&[Act]]) {
        let sites = self.model.as_ref().map_or(0, |model| model.plan().sites().len());
        let steps: usize = runs.iter().map(|acts| reads(acts).len()).sum();
        self.watch.begin(check, (sites * steps) as u64);
    }

    pub(crate) fn whole(&self) -> Vec<Act> {
        vec![Act::Read(self.texts.prompt.len())]
    }

    /// The length of a prompt that can be cut.
    fn several(&self) -> Result<usize, Outcome> {
        self.model()?;
        match self.texts.prompt.len() {
            1 => {
                Err(Outcome::not_measured("a prompt of one token cannot be cut; give a longer one"))
            }
            n => Ok(n),
        }
    }

    fn all_threads(&self) -> Vec<usize> {
        let all = self.factory.threads();
        match (self.options.quick, all.first(), all.last()) {
            (true, Some(&first), Some(&last)) if first != last => vec![first, last],
            _ => all,
        }
    }

    fn ways(&self, threads: Vec<usize>, isas: Vec<&'static str>) -> Vec<(String, Way)> {
        let plural = |n| if n == 1 { "" } else { "s" };
        let threads =
            threads.into_iter().map(|n| (format!("{n} thread{}", plural(n)), Way::Threads(n)));
        threads.chain(isas.into_iter().map(|isa| (isa.to_owned(), Way::Isa(isa)))).collect()
    }

    fn build(&self, way: Way) -> Result<Model<F::Backend>, crate::FactoryError> {
        Ok(Model::load(self.factory.build(way)?, self.checkpoint)?)
    }
}

impl Tally {
    fn looked_at(&self) -> String {
        let s = if self.runs == 1 { "" } else { "s" };
        format!("{} run{s}, {} rows of all sites", self.runs, self.rows)
    }

    fn verdict(self, looked_at: String) -> Verdict {
        let missed = self.missed.join("; ");
        if self.breaks.is_empty() && !missed.is_empty() {
            let looked_at = Some(looked_at);
            return Verdict {
                outcome: Outcome::not_measured(missed),
                looked_at,
                notes: Vec::new(),
            };
        }
        let missed = self.missed.iter().map(|why| Note::new(format!("not measured: {why}")));
        let notes = missed.collect();
        Verdict { notes, ..Verdict::new(self.breaks, looked_at) }
    }
}

/// The first op that another plan has otherwise.
fn plan_difference(expected: &Plan, found: &Plan) -> Option<String> {
    if expected.fingerprint() == found.fingerprint() {
        return None;
    }
    let pairs = expected.ops().iter().zip(found.ops());
    let op = pairs.into_iter().find(|(a, b)| a != b);
    Some(match op {
        Some((a, b)) => format!(
            "{} ({}) runs {} instead of {}",
            a.op,
            a.sites.join(", "),
            b.kernel.kernel,
            a.kernel.kernel
        ),
        None => format!("{} ops instead of {}", found.ops().len(), expected.ops().len()),
    })
}
