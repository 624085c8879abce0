//! `--save-tensor` and `--layers`: which sites are meant.
//!
//! Asking for what the model does not have is an error that lists what it has: an empty selection that exits
//! cleanly is how stages go missing.

use anyhow::{Context, Result, bail, ensure};
use apr_model::{Site, Stage, TapSet};

/// The sites among `sites` that `stages` and `layers` name.
///
/// `stages` is `all` or a list of stage names; `layers` a list of numbers, ranges (`0..4` without
/// its end, `0..=4` with it) and `last`.
pub(crate) fn select(sites: &[Site], stages: &str, layers: Option<&str>) -> Result<TapSet> {
    let count = sites.iter().filter_map(|site| site.layer).max().map_or(0, |last| last + 1);
    let layers = layers.map(|list| parse_layers(list, count)).transpose()?;
    let stages = parse_stages(stages)?;
    if let Some(stages) = &stages {
        let available = |stage: &Stage| sites.iter().any(|site| site.stage == *stage);
        if let Some(absent) = stages.iter().find(|stage| !available(stage)) {
            let has: Vec<&str> =
                Stage::all().filter(|stage| available(stage)).map(Stage::name).collect();
            bail!("this model has no stage `{absent}`; it has: {}", has.join(", "));
        }
    }
    let selected: TapSet = sites
        .iter()
        .copied()
        .filter(|site| stages.as_ref().is_none_or(|stages| stages.contains(&site.stage)))
        .filter(|site| match (&layers, site.layer) {
            (Some(layers), Some(layer)) => layers.contains(&layer),
            // With layers named, whole-model stages are meant only if they are named too.
            (Some(_), None) => stages.is_some(),
            (None, _) => true,
        })
        .collect();
    if selected.is_empty() {
        bail!("--save-tensor and --layers together select nothing");
    }
    Ok(selected)
}

/// The stages in a comma-separated list; `None` for `all`.
fn parse_stages(list: &str) -> Result<Option<Vec<Stage>>> {
    let names: Vec<&str> = list.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    match names[..] {
        [] => bail!("no stage named; `all` means every stage"),
        ["all"] => Ok(None),
        _ => Ok(Some(names.iter().map(|name| name.parse()).collect::<Result<_, _>>()?)),
    }
}

fn parse_layers(list: &str, count: u32) -> Result<Vec<u32>> {
    let mut layers = Vec::new();
    for part in list.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let one = |text: &str| -> Result<u32> {
            let layer = match text.trim() {
                "last" => count.saturating_sub(1),
                text => text.parse().ok().with_context(|| {
                    format!(
                        "`{part}` is no layer; expected a number, a range such as 0..4, or `last`"
                    )
                })?,
            };
            let last = count.saturating_sub(1);
            ensure!(
                layer < count,
                "layer {layer} does not exist: the model has layers 0 to {last}"
            );
            Ok(layer)
        };
        match part.split_once("..") {
            None => layers.push(one(part)?),
            Some((first, end)) => {
                let first = one(first)?;
                let end = match end.strip_prefix('=') {
                    Some(last) => one(last)? + 1,
                    // The end of a half-open range may be the number of layers.
                    None if end.trim().parse() == Ok(count) => count,
                    None => one(end)?,
                };
                ensure!(first < end, "the range {part} is empty");
                layers.extend(first..end);
            }
        }
    }
    ensure!(!layers.is_empty(), "--layers names no layer");
    Ok(layers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sites() -> Vec<Site> {
        let layer = |i| [Stage::AttnNorm, Stage::FfnOut].map(|stage| Site::layer(i, stage));
        let mut sites = vec![Site::whole(Stage::Embedding)];
        sites.extend((0..6).flat_map(layer));
        sites.push(Site::whole(Stage::LmHead));
        sites
    }

    fn names(stages: &str, layers: Option<&str>) -> Result<Vec<String>, String> {
        let selected = select(&sites(), stages, layers).map_err(|e| format!("{e:#}"))?;
        Ok(selected.iter().map(|site| site.to_string()).collect())
    }

    #[test]
    fn all_means_every_site_of_the_model() {
        assert_eq!(names("all", None).unwrap().len(), 14);
    }

    #[test]
    fn layers_are_numbers_ranges_and_last() {
        let chosen = |layers| names("ffn_out", Some(layers)).unwrap();
        let expected = |layers: &[u32]| -> Vec<String> {
            layers.iter().map(|i| format!("layers.{i}.ffn_out")).collect()
        };
        assert_eq!(chosen("0..2,3,last"), expected(&[0, 1, 3, 5]));
        assert_eq!(chosen("3..=4"), expected(&[3, 4]));
        assert_eq!(chosen("4..6"), expected(&[4, 5]));
    }

    #[test]
    fn naming_layers_leaves_out_whole_model_stages_unless_they_are_named() {
        assert_eq!(names("all", Some("1")).unwrap().len(), 2);
        assert_eq!(
            names("logits,attn_norm", Some("1")).unwrap(),
            ["layers.1.attn_norm", "lm_head"]
        );
    }

    #[test]
    fn asking_for_what_is_not_there_is_an_error_that_says_what_is() {
        assert!(names("qkv_bias", None).unwrap_err().contains("it has: embedding, attn_norm"));
        assert!(names("nonsense", None).unwrap_err().contains("unknown stage `nonsense`"));
        assert!(names("all", Some("6")).unwrap_err().contains("layers 0 to 5"));
        assert!(names("all", Some("3..1")).unwrap_err().contains("empty"));
        assert!(names("all", Some(" , ")).unwrap_err().contains("names no layer"));
        assert!(names("", None).unwrap_err().contains("no stage named"));
        for wrong in ["x", "..2", "1..", "-1", "99999999999"] {
            let error = names("all", Some(wrong)).unwrap_err();
            assert!(error.starts_with(&format!("`{wrong}` is no layer")), "{error}");
        }
    }
}
