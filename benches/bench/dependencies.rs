//! A site's dependencies in a new container: the archive on the workspace unpacked and linked, beside
//! `npm ci` from a warm download cache, in turns.

use std::{fs, path::Path, time::Duration, time::Instant};

use anyhow::{Context as _, ensure};
use greenroom::{
    process::{ConfinementMode, Launcher},
    workspace::{AttachedKind, Dependencies, DependencyRequest, NodeTools},
};

use crate::{
    report::{Table, Unit},
    world::{World, copy_site},
};

const ROUNDS: usize = 7;

pub(crate) async fn measure(world: &World) -> anyhow::Result<Table> {
    let site = world.site()?;
    let root = world.folder("dependencies");
    fs::create_dir_all(&root)?;
    let tools = NodeTools {
        egress: None,
        node: world.node()?.to_owned(),
        npm: world.npm_program()?,
        env: World::npm_settings()
            .into_iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect(),
        readable: World::npm_settings()
            .into_iter()
            .filter(|(name, _)| name.to_ascii_lowercase().ends_with("userconfig"))
            .map(|(_, value)| value.into())
            .collect(),
    };
    let binary = Path::new(env!("CARGO_BIN_EXE_greenroom"));
    let silence = Duration::from_secs(120);
    let launcher = Launcher::start_with_binary(binary, silence, ConfinementMode::Auto)?;
    let dependencies = Dependencies::new(launcher, tools);
    let ensure = async |name: &str| {
        let worktree = root.join(name);
        copy_site(site, &worktree, false)?;
        let from = worktree.clone();
        let request = DependencyRequest {
            worktree,
            export: move |to: &Path| copy_site(&from, to, false),
            cache: root.join("cache"),
            archives: Some(root.join("archives")),
        };
        let begun = Instant::now();
        let attached = dependencies.ensure(request, |_| ()).await?;
        let took = begun.elapsed().as_secs_f64() * 1e3;
        if let Some(unkept) = attached.unkept {
            dependencies.keep(unkept).await;
        }
        anyhow::Ok((attached.kind, took))
    };
    let (kind, _) = ensure("first").await.context("the first installation")?;
    ensure!(kind == AttachedKind::Installed, "it came from elsewhere");
    let by_npm = root.join("npm");
    let downloads = root.join("npm-cache");
    copy_site(site, &by_npm, false)?;
    world.npm(&by_npm, &downloads, &["ci"])?;

    let [mut restored, mut linked, mut ci] = [const { Vec::new() }; 3];
    for round in 0..ROUNDS {
        // As a new container begins.
        fs::remove_dir_all(root.join("cache"))?;
        let (kind, took) = ensure(&format!("restored-{round}")).await?;
        ensure!(kind == AttachedKind::Restored, "it was {kind:?}");
        restored.push(took);
        let (kind, took) = ensure(&format!("linked-{round}")).await?;
        ensure!(kind == AttachedKind::Cached, "it was {kind:?}");
        linked.push(took);
        fs::remove_dir_all(by_npm.join("node_modules"))?;
        let begun = Instant::now();
        let args = ["ci", "--prefer-offline", "--ignore-scripts"];
        world.npm(&by_npm, &downloads, &args)?;
        ci.push(begun.elapsed().as_secs_f64() * 1e3);
        for name in [format!("restored-{round}"), format!("linked-{round}")] {
            fs::remove_dir_all(root.join(name))?;
        }
    }
    let mut table = Table::default();
    let what = "a new container's dependencies: checked, unpacked from the archive, linked";
    let base = table.own(what, Unit::Ms, restored, "a third of `npm ci`");
    let by_hand = "`npm ci --prefer-offline --ignore-scripts`, warm download cache";
    table.rival(by_hand, Unit::Ms, ci.clone(), base);
    let what = "a new thread's: the master checked to the last byte, linked";
    let base = table.own(what, Unit::Ms, linked, "");
    table.rival(by_hand, Unit::Ms, ci, base);
    table.note("The built-in site's 130 MB in 10,000 files.");
    Ok(table)
}
