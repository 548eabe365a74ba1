//! Holds the direction of dependencies: everybody imports the contracts, which import nobody of ours and no runtime.

use std::collections::BTreeSet;

use cargo_metadata::{CargoOpt, DependencyKind, MetadataCommand, PackageId};

#[test]
fn contracts_depend_on_nothing_of_ours_and_on_no_runtime() {
    let metadata = MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .features(CargoOpt::AllFeatures)
        // One platform: what some crates need in a browser is no matter here.
        .other_options(["--offline", "--filter-platform", "x86_64-unknown-linux-gnu"].map(str::to_owned))
        .exec()
        .expect("cargo metadata");
    let resolve = metadata.resolve.as_ref().expect("a resolved graph");
    let root = metadata.packages.iter().find(|package| package.name.as_str() == "headgate-contracts").expect("this package").id.clone();

    let (mut seen, mut open): (BTreeSet<PackageId>, Vec<PackageId>) = (BTreeSet::new(), vec![root.clone()]);
    while let Some(id) = open.pop() {
        let node = resolve.nodes.iter().find(|node| node.id == id).expect("a node for every package");
        for dependency in &node.deps {
            let is_used = dependency.dep_kinds.iter().any(|kind| kind.kind != DependencyKind::Development);
            if is_used && seen.insert(dependency.pkg.clone()) {
                open.push(dependency.pkg.clone());
            }
        }
    }
    let names: BTreeSet<&str> =
        metadata.packages.iter().filter(|package| seen.contains(&package.id)).map(|package| package.name.as_str()).collect();
    assert!(names.contains("serde_json"), "the walk finds what is there: {names:?}");
    for name in &names {
        let is_runtime = ["tokio", "mio", "async-std", "smol", "hyper", "tower", "futures", "futures-util", "socket2"].contains(name);
        assert!(!name.starts_with("headgate") && !is_runtime, "contracts must not depend on {name}");
    }
}
