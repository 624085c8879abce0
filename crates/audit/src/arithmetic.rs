//! In what arithmetic a capture was made: declared by its manifest, said by the user, or inferred.

use apr_capture::{Capture, manifest};
use apr_reference::{Activations, Arithmetic};
use apr_tensor::{DType, activation::ActivationType};
use serde::Serialize;

use crate::{Error, Result, twin::Units};

/// An arithmetic to emulate, and how much accumulating in it may add.
#[derive(Clone, Debug, PartialEq)]
pub struct Declared {
    pub(crate) arithmetic: Arithmetic,
    pub(crate) units: Units,
    /// What it is called, and where it comes from.
    pub origin: ArithmeticOrigin,
}

/// Where an audit's arithmetic comes from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ArithmeticOrigin {
    /// The arithmetic, in words.
    pub name: String,
    /// Who says so.
    pub from: ArithmeticFrom,
}

/// Who says what arithmetic a capture was made in.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ArithmeticFrom {
    /// The capture's manifest.
    Manifest,
    /// The user.
    Given,
    /// Nobody: it is the candidate under which the stages of the median layer are nearest to their bounds.
    Inferred {
        /// Each candidate, and over the stages the product of what the median layer leaves unexplained, in units of bounds.
        candidates: Vec<(String, f64)>,
    },
}

/// An arithmetic by name, for captures that do not declare theirs.
struct Candidate {
    name: &'static str,
    about: &'static str,
    arithmetic: Arithmetic,
    attention: DType,
    output: DType,
}

/// From the tightest to the loosest: of two that explain a capture, the first is meant.
fn candidates() -> Vec<Candidate> {
    let plain = |name, about, arithmetic| Candidate {
        name,
        about,
        arithmetic,
        attention: DType::F32,
        output: DType::F32,
    };
    let llama = Arithmetic::LLAMA_CPP;
    let typed = |name, about, dtype, kind| Candidate {
        name,
        about,
        arithmetic: Arithmetic {
            activations: Activations::All(kind),
            kv: dtype,
            queries: kind,
            probabilities: kind,
        },
        attention: DType::F32,
        output: dtype,
    };
    vec![
        plain("f32", "nothing rounded", Arithmetic::EXACT),
        plain(
            "f32-kv16",
            "nothing rounded but the cache, which is f16",
            Arithmetic::EXACT.with_kv(DType::F16),
        ),
        plain("cpu", "apr's cpu backend: 8-bit activations, f16 cache", Arithmetic::CPU),
        plain("cpu-kv32", "the same with an f32 cache", Arithmetic::CPU.with_kv(DType::F32)),
        plain(
            "llama-cpp-no-fa",
            "llama.cpp without flash attention, f16 cache",
            Arithmetic { probabilities: ActivationType::F16, ..llama.clone() },
        ),
        plain(
            "llama-cpp-kv32",
            "llama.cpp with an f32 cache",
            Arithmetic { queries: ActivationType::F32, kv: DType::F32, ..llama.clone() },
        ),
        Candidate {
            attention: DType::F16,
            ..plain("llama-cpp", "llama.cpp with flash attention, f16 cache", llama)
        },
        typed("f16", "everything kept in f16", DType::F16, ActivationType::F16),
        typed("bf16", "everything kept in bf16", DType::BF16, ActivationType::BF16),
    ]
}

impl Candidate {
    fn declared(self, from: ArithmeticFrom) -> Declared {
        let units = Units {
            product: Units::of(DType::F32),
            attention: Units::of(self.attention),
            output: Units::of(self.output),
            captured: 0.0,
            weights: 0.0,
        };
        let name = format!("{} ({})", self.name, self.about);
        let origin = ArithmeticOrigin { name, from };
        Declared { arithmetic: self.arithmetic, units, origin }
    }
}

impl Declared {
    /// The same of values that were captured as the types of `capture` say: perhaps in a narrower type than the engine's.
    pub(crate) fn captured_by(mut self, capture: &Capture) -> Self {
        let sites = capture.sites();
        let infos = (0..capture.steps().len())
            .flat_map(|step| sites.iter().filter_map(move |&site| capture.info(step, site)));
        let unit = infos.map(|info| Units::of(info.dtype())).fold(0.0, f64::max);
        if unit > self.units.output {
            self.units.captured = unit;
        }
        self
    }

    /// The names that [`Declared::named`] knows, with what they mean.
    pub fn names() -> Vec<(&'static str, &'static str)> {
        candidates().into_iter().map(|candidate| (candidate.name, candidate.about)).collect()
    }

    /// The arithmetic called `name`.
    pub fn named(name: &str) -> Result<Self> {
        let found = candidates().into_iter().find(|candidate| candidate.name == name);
        let found = found.ok_or_else(|| Error::UnknownArithmetic {
            name: name.to_owned(),
            known: Self::names().into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(", "),
        })?;
        Ok(found.declared(ArithmeticFrom::Given))
    }

    /// What is tried where nobody says.
    pub(crate) fn to_try() -> Vec<(&'static str, Self)> {
        let try_it = |candidate: Candidate| {
            (
                candidate.name,
                candidate.declared(ArithmeticFrom::Inferred { candidates: Vec::new() }),
            )
        };
        candidates().into_iter().map(try_it).collect()
    }

    /// What the manifest of `capture` declares, if it declares any.
    pub(crate) fn by(capture: &Capture) -> Option<Self> {
        let provenance = capture.provenance()?;
        let ops = &provenance.plan.as_ref()?.ops;
        let is_product = |op: &&manifest::PlanOp| op.op == "linear" || op.op == "expert_linear";
        let linear: Vec<_> = ops.iter().filter(is_product).collect();
        if linear.is_empty() {
            return None;
        }
        let mut table: Vec<(DType, ActivationType)> = Vec::new();
        for op in &linear {
            for (i, weight) in op.weights.iter().enumerate() {
                let declared = op.activations.get(i).or(op.activations.first())?;
                let (weight, declared) = (dtype(weight)?, activation(declared)?);
                if !table.iter().any(|(dtype, _)| *dtype == weight) {
                    table.push((weight, declared));
                }
            }
        }
        let kv = provenance.kv.as_deref().and_then(dtype);
        let kv = kv.or_else(|| dtype(&ops.iter().find(|op| op.op == "kv_append")?.output));
        let op_of =
            |stage: &str| ops.iter().find(|op| op.sites.iter().any(|site| site.ends_with(stage)));
        let rounds = |op: Option<&manifest::PlanOp>| {
            op.and_then(|op| activation(op.activations.first()?)).unwrap_or(ActivationType::F32)
        };
        let attention = op_of(".attention");
        let queries = rounds(op_of(".attn_scores").or(attention));
        // A fused kernel says of its queries what it rounds, and has its own kind of weights.
        let fused = attention.is_some_and(|op| op.op != "attn_values");
        let probabilities = if fused { ActivationType::F32 } else { rounds(attention) };
        let unit = |name: &str| Units::of(dtype(name).unwrap_or(DType::F32));
        let largest = |units: &mut dyn Iterator<Item = f64>| units.fold(0.0, f64::max);
        let units = Units {
            product: largest(&mut linear.iter().map(|op| unit(&op.accumulation))),
            attention: attention.map_or(Units::of(DType::F32), |op| unit(&op.accumulation)),
            output: largest(
                &mut ops.iter().filter(|op| op.op != "kv_append").map(|op| unit(&op.output)),
            ),
            captured: 0.0,
            weights: 0.0,
        };
        let kv = kv.unwrap_or(DType::F32);
        let name = describe(&table, kv, queries, &units);
        Some(Self {
            arithmetic: Arithmetic {
                activations: Activations::Declared(table),
                kv,
                queries,
                probabilities,
            },
            units,
            origin: ArithmeticOrigin { name, from: ArithmeticFrom::Manifest },
        })
    }
}

fn describe(
    table: &[(DType, ActivationType)],
    kv: DType,
    queries: ActivationType,
    units: &Units,
) -> String {
    let rounded = table.iter().filter(|(_, kind)| *kind != ActivationType::F32);
    let mut parts: Vec<String> =
        rounded.map(|(weight, kind)| format!("{weight} weights meet {kind} activations")).collect();
    if parts.is_empty() {
        parts.push("activations are not rounded".to_owned());
    }
    if queries != ActivationType::F32 {
        parts.push(format!("queries are rounded to {queries}"));
    }
    parts.push(match kv {
        DType::F32 | DType::F64 => "the cache is not rounded".to_owned(),
        kv => format!("the cache is {kv}"),
    });
    // What widens bounds is said, whoever declares it.
    for (what, unit) in [
        ("products are summed up", units.product),
        ("attention is summed up", units.attention),
        ("results are kept", units.output),
    ] {
        let narrow = [DType::F16, DType::BF16].into_iter().find(|&dtype| Units::of(dtype) == unit);
        parts.extend(narrow.map(|dtype| format!("{what} in {dtype}")));
    }
    parts.join(", ")
}

fn dtype(name: &str) -> Option<DType> {
    DType::all().find(|dtype| dtype.name().eq_ignore_ascii_case(name))
}

fn activation(name: &str) -> Option<ActivationType> {
    use ActivationType::{BF16, F16, F32, Q8_0, Q8_1, Q8_K};
    match name {
        // In f64 nothing is lost that would be seen.
        "F64" | "f64" => Some(F32),
        _ => [F32, F16, BF16, Q8_0, Q8_1, Q8_K]
            .into_iter()
            .find(|kind| kind.name().eq_ignore_ascii_case(name)),
    }
}
