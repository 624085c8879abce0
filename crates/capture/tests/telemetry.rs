//! Statistics say which sample they are of, and see what is sick.

mod support;

use apr_capture::Telemetry;
use apr_model::{Observer, Site, Stage, TapSet, Values, View};
use apr_tensor::Summary;
use support::*;

#[test]
fn all_rows_and_the_last_row_are_told_apart_in_every_stage() {
    let (dims, step) = (dims(), prefill(&[5, 6, 7]));
    let mut telemetry = Telemetry::new(all_sites(&dims));
    run(&mut telemetry, &dims, &step).unwrap();
    let [observed] = telemetry.steps() else { panic!("one step") };
    assert_eq!(observed.first_not_finite, None);
    for found in &observed.sites {
        let (shape, values) = values(&dims, &step, found.site);
        match found.site.stage {
            Stage::AttnScores | Stage::AttnSoftmax => {
                let head = |h: usize| &values[h * 9..(h + 1) * 9];
                let last = (0..4).flat_map(|h| head(h)[6..].to_vec()).collect::<Vec<_>>();
                assert_eq!(found.last_row.max(), Summary::of(&last).max());
                assert_eq!(found.all_rows.count(), 4 * 6, "masked entries are no sample");
            }
            _ => {
                let width: usize = shape[1..].iter().product();
                let last = &values[values.len() - width..];
                assert_eq!(found.last_row, Summary::of(last), "{}", found.site);
                assert_eq!(found.all_rows.count(), values.len() as u64);
                assert_eq!(found.all_rows.min(), Summary::of(&values).min());
            }
        }
        assert_eq!(found.positions, step.positions(found.site));
    }
}

#[test]
fn the_first_sick_value_is_that_of_the_order_of_computation_not_of_arrival() {
    let (late, early) = (Site::layer(1, Stage::FfnOut), Site::layer(0, Stage::AttnOut));
    let step = prefill(&[5, 6]);
    let mut telemetry = Telemetry::new(TapSet::from_iter([late, early]));
    telemetry.begin(&step).unwrap();
    let mut values = [1.0; 16];
    values[3] = f32::NAN;
    for site in [late, early] {
        telemetry
            .value(&step, site, View { shape: &[2, 8], values: Values::F32(&values) })
            .unwrap();
    }
    telemetry.end(&step).unwrap();
    let observed = &telemetry.steps()[0];
    assert_eq!(observed.first_not_finite, Some(early));
    assert_eq!((observed.sites[0].all_rows.nan(), observed.sites[0].last_row.nan()), (1, 0));
}

#[test]
fn rows_of_zeros_are_listed_by_position() {
    let site = Site::layer(0, Stage::FfnOut);
    let step = decode(4, &[5], 9);
    let mut telemetry = Telemetry::new(TapSet::from_iter([site]));
    telemetry.begin(&step).unwrap();
    let view = View { shape: &[1, 8], values: Values::F64(&[0.0; 8]) };
    telemetry.value(&step, site, view).unwrap();
    telemetry.end(&step).unwrap();
    assert_eq!(telemetry.steps()[0].sites[0].dead_rows, [9]);
}
