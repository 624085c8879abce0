use apr_audit::*;
fn main() {
    let mut args = std::env::args().skip(1);
    let cap = apr_capture::Capture::open(args.next().unwrap()).unwrap();
    let model = apr_format::Checkpoint::open(args.next().unwrap()).unwrap();
    let mut options = Options::default();
    if let Some(name) = args.next() {
        options.arithmetic = Some(Declared::named(&name).unwrap());
    }
    let t = std::time::Instant::now();
    let a = audit(&cap, &model, &options, &mut |_| {}).unwrap();
    for s in &a.stages {
        println!(
            "{:32} {:?} l {:.2e} f {:.2e} u {:.2e} b {:.2e} excess {:.2} {:?} span {}",
            s.site.to_string(),
            s.finding,
            s.errors.local,
            s.errors.floor,
            s.errors.unexplained,
            s.errors.bound,
            s.worst.excess,
            s.worst.group,
            s.span.len()
        );
    }
    println!("{:?}\n{:?}", a.arithmetic, a.not_measured.first());
    println!("{} in {:?}", a.verdict, t.elapsed());
}
