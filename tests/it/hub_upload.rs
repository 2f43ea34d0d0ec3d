//! Uploads to the Hub that take long, break off, or stand still.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::{
    fs,
    os::unix::fs::{FileExt, PermissionsExt},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use greenroom::{
    config::Secret,
    hub::{
        Hub, HubError, HubSettings, LoraFolder, Meter, ModelName, Publication, Published, Stage,
    },
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{process::Command, time::timeout};

use crate::{
    hub::{FILES, failure, holds_all_of, noise, publish, ran, told, training},
    support::{Content, Folders, HF_TOKEN, HubStandIn, PATIENCE, files_below, wait_for},
};

#[tokio::test]
async fn a_publication_that_was_killed_goes_on_where_it_was() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    let folder = training(&folders);
    // The model is up, and half of a sample.
    hub.hold_after(400_000);
    let mut killed = publish(&folders, &hub, &[]).spawn().unwrap();
    wait_for("half of it", || (hub.received() >= 400_000).then_some(())).await;
    killed.kill().await.unwrap();
    killed.wait().await.unwrap();
    assert!(
        hub.repository("alice/pots").commits.is_empty(),
        "all or nothing shows"
    );

    // Interrupted by a person, it says how to go on.
    let stopped = publish(&folders, &hub, &[]).spawn().unwrap();
    wait_for("its upload", || (hub.count("PUT ") == 3).then_some(())).await;
    kill(
        Pid::from_raw(stopped.id().unwrap().cast_signed()),
        Signal::SIGINT,
    )
    .unwrap();
    let stopped = timeout(PATIENCE, stopped.wait_with_output())
        .await
        .unwrap()
        .unwrap();
    let line = failure(&stopped);
    assert!(
        line.contains("the same command goes on from here"),
        "{line}"
    );

    hub.hold_after(u64::MAX);
    let resumed = told(&ran(publish(&folders, &hub, &["--json"])).await);
    assert_eq!(resumed["uploadedBytes"], 200_000, "the model was there");
    // The model once; the sample killed, stopped, and at last.
    assert_eq!(hub.count("PUT "), 1 + 3);
    let repository = hub.repository("alice/pots");
    assert_eq!(repository.commits.len(), 1);
    holds_all_of(&repository, &folder);
}

#[tokio::test]
async fn a_file_of_two_gigabytes_takes_no_memory() {
    const SIZE: u64 = 2 << 30;
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    let folder = training(&folders);
    let model = fs::File::create(folder.join("my_lora.safetensors")).unwrap();
    model.set_len(SIZE).unwrap();
    let mut running = publish(&folders, &hub, &["--json"]).spawn().unwrap();
    let status = format!("/proc/{}/status", running.id().unwrap());
    let mut most_kib = 0;
    let ended = wait_for("its end", || {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let peak = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let peak = peak.and_then(|peak| peak.trim().trim_end_matches(" kB").parse::<u64>().ok());
        most_kib = most_kib.max(peak.unwrap_or_default());
        running.try_wait().unwrap()
    });
    assert!(ended.await.success());
    let sent = hub.received();
    assert!(sent >= SIZE && most_kib > 0, "{sent}");
    assert!(most_kib < 100 * 1024, "{most_kib} KiB");
}

#[tokio::test]
async fn large_files_go_in_parts_where_the_hub_wants_that() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    let folder = training(&folders);
    hub.state().part_bytes = Some(70_000);
    // A part that fails is sent again.
    hub.state().faults = vec![("storage", 503)];
    let published = told(&ran(publish(&folders, &hub, &["--json"])).await);
    assert_eq!(published["uploadedBytes"], 500_000);
    holds_all_of(&hub.repository("alice/pots"), &folder);
    assert_eq!(hub.count("PUT "), 5 + 3 + 1);
    assert!(hub.state().leaked.is_empty());
}

#[tokio::test]
async fn what_is_large_or_there_twice_goes_to_the_storage_once() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    let folder = training(&folders);
    // The Hub would have it in the commit, of which all is held in memory.
    hub.state().wants = Some("regular");
    let model = noise(1, 9 << 20);
    fs::write(folder.join("my_lora.safetensors"), &model).unwrap();
    let sample = |prompt| format!("samples/1737531309000__000002000_{prompt}.jpg");
    fs::write(folder.join(sample(2)), &model).unwrap();
    let published = told(&ran(publish(&folders, &hub, &["--json"])).await);
    assert_eq!(published["uploadedBytes"], 9 << 20, "{published}");
    assert_eq!(hub.count("PUT "), 1);
    let repository = hub.repository("alice/pots");
    let stored = &repository.files["my_lora.safetensors"];
    assert!(matches!(stored, Content::Large { size, .. } if *size == 9 << 20));
    assert_eq!(repository.files[&sample(2)], *stored);
}

#[tokio::test]
async fn a_storage_that_takes_nothing_is_given_up() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    training(&folders);
    hub.state().faults = vec![("storage", 403); 30];
    let line = failure(&ran(publish(&folders, &hub, &[])).await);
    assert!(
        line.contains("the upload") && line.contains("403"),
        "{line}"
    );
    assert_eq!(hub.count("PUT "), 3);
    // The same where somebody else commits each time.
    hub.state().faults = vec![("/commit/", 412); 30];
    failure(&ran(publish(&folders, &hub, &[])).await);
    assert_eq!(hub.count("/commit/"), 3);
}

#[tokio::test]
async fn an_upload_goes_nowhere_inside() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    training(&folders);
    hub.state().upload_address = Some("http://169.254.169.254/latest".to_owned());
    let line = failure(&ran(publish(&folders, &hub, &[])).await);
    assert!(line.contains("to which nothing is sent"), "{line}");
}

/// Publishes with a folder of its own for what is not finished.
fn publishes(folders: &Folders, hub: &HubStandIn) -> Command {
    let mut command = publish(folders, hub, &["--json"]);
    command.env("CACHE_PATH", folders.join("cache"));
    command
}

fn notes(folders: &Folders) -> Vec<PathBuf> {
    files_below(&folders.join("cache"))
}

/// Publishes in parts, and kills it in the middle of the model's third one.
async fn killed_in_the_third_part(folders: &Folders, hub: &HubStandIn) {
    hub.state().part_bytes = Some(70_000);
    hub.hold_after(150_000);
    let mut killed = publishes(folders, hub).spawn().unwrap();
    wait_for("the third part", || {
        (hub.received() >= 150_000).then_some(())
    })
    .await;
    killed.kill().await.unwrap();
    killed.wait().await.unwrap();
    hub.hold_after(u64::MAX);
    assert_eq!(hub.count("PUT "), 3);
}

#[tokio::test]
async fn a_file_in_parts_goes_on_with_those_that_are_not_up() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    let folder = training(&folders);
    killed_in_the_third_part(&folders, &hub).await;
    let noted = notes(&folders);
    assert_eq!(noted.len(), 1, "{noted:?}");
    let text = fs::read_to_string(&noted[0]).unwrap();
    assert!(!text.contains("hf_"), "{text}");
    assert_eq!(
        noted[0].metadata().unwrap().permissions().mode() & 0o777,
        0o600
    );

    let resumed = told(&ran(publishes(&folders, &hub)).await);
    assert_eq!(resumed["uploadedBytes"], 300_000 - 140_000 + 200_000);
    assert_eq!(hub.count("PUT "), 3 + 3 + 3);
    holds_all_of(&hub.repository("alice/pots"), &folder);
    assert_eq!(notes(&folders), Vec::<PathBuf>::new(), "it is over");
}

#[tokio::test]
async fn parts_whose_addresses_are_good_no_more_are_begun_anew() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    let folder = training(&folders);
    killed_in_the_third_part(&folders, &hub).await;
    hub.state().faults = vec![("storage", 403)];
    let resumed = told(&ran(publishes(&folders, &hub)).await);
    assert_eq!(resumed["uploadedBytes"], 500_000);
    assert_eq!(hub.count("PUT "), 3 + 1 + 5 + 3);
    holds_all_of(&hub.repository("alice/pots"), &folder);

    // The same where the end is refused, as of an upload that the storage has forgotten.
    *hub.state() = Default::default();
    hub.state().part_bytes = Some(70_000);
    hub.state().faults = vec![("complete", 403)];
    told(&ran(publishes(&folders, &hub)).await);
    assert_eq!(hub.count("PUT "), 5 + 5 + 3);
    assert_eq!(notes(&folders), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn parts_of_another_file_are_not_gone_on_with() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    let folder = training(&folders);
    killed_in_the_third_part(&folders, &hub).await;
    fs::write(folder.join("my_lora.safetensors"), noise(8, 300_000)).unwrap();
    let other = told(&ran(publishes(&folders, &hub)).await);
    assert_eq!(other["uploadedBytes"], 500_000);
    holds_all_of(&hub.repository("alice/pots"), &folder);
}

#[tokio::test]
async fn addresses_may_expire_while_each_of_many_files_is_uploaded() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    let folder = training(&folders);
    for prompt in 2..8 {
        let name = format!("samples/1737531309000__000002000_{prompt}.jpg");
        fs::write(folder.join(name), noise(10 + prompt, 20_000)).unwrap();
    }
    // Eight large files, each refused once.
    hub.state().faults = [("storage", 403), ("storage", 0)].repeat(8);
    let published = told(&ran(publishes(&folders, &hub)).await);
    assert_eq!(published["uploadedBytes"], 300_000 + 200_000 + 6 * 20_000);
    assert_eq!(hub.count("PUT "), 16);
}

/// Publishes in this process, where an upload that does not move is given up sooner.
async fn published(
    folders: &Folders,
    hub: &HubStandIn,
    still: Duration,
) -> Result<Published, HubError> {
    let publishing = published_by(folders, hub, still, Arc::default());
    timeout(PATIENCE, publishing).await.expect("it ends")
}

async fn published_by(
    folders: &Folders,
    hub: &HubStandIn,
    still: Duration,
    meter: Arc<Meter>,
) -> Result<Published, HubError> {
    let settings = HubSettings {
        endpoint: hub.url(),
        token: Some(Secret::new(HF_TOKEN)),
        still,
        unfinished: Some(folders.join("cache/hub")),
    };
    let publication = Publication {
        name: ModelName::parse("pots").unwrap(),
        folder: LoraFolder::read(&folders.join("home/my_lora"), None).unwrap(),
        is_private: true,
        replaces_card: false,
    };
    let hub = Hub::new(settings).await.unwrap();
    hub.publish(&publication, &meter).await
}

#[tokio::test]
async fn how_far_it_is_counts_what_goes_up_and_that_once() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    training(&folders);
    hub.state().part_bytes = Some(70_000);
    // Two parts fail once each.
    hub.state().faults = vec![("storage", 503), ("storage", 0), ("storage", 503)];
    // It is dropped in the midst of it.
    let dropped = async |what: &str, is_time: &dyn Fn() -> bool| {
        let meter = Arc::new(Meter::default());
        let publishing = published_by(&folders, &hub, PATIENCE, Arc::clone(&meter));
        tokio::select! {
            ended = publishing => panic!("{ended:?}"),
            () = wait_for(what, || is_time().then_some(())) => {}
        }
        meter.progress()
    };
    // The model, and of the second sample a part, and something of the next one.
    hub.hold_after(371_000);
    let progress = dropped("its middle", &|| hub.received() >= 371_000).await;
    assert_eq!(
        (progress.stage, &*progress.file, progress.total),
        (Stage::Uploading, FILES[3], 500_000)
    );
    assert!((370_000..=440_000).contains(&progress.done), "{progress:?}");
    hub.hold_after(0);
    let puts = hub.count("PUT ");
    let progress = dropped("the part again", &|| hub.count("PUT ") > puts).await;
    assert_eq!((&*progress.file, progress.total), (FILES[3], 130_000));
    assert!(progress.done <= 70_000, "{progress:?}");
    hub.hold_after(u64::MAX);
    let rest = published(&folders, &hub, PATIENCE).await.unwrap();
    // Of a part that was cut off twice nothing counts.
    assert_eq!(rest.uploaded_bytes, 130_000);
}

#[tokio::test]
async fn a_storage_that_never_answers_is_given_up() {
    // It takes everything in and says nothing; or it takes nothing any more.
    for hold_after in [u64::MAX, 100_000] {
        let (hub, folders) = (HubStandIn::start().await, Folders::new());
        training(&folders);
        hub.state().silent = 99;
        hub.hold_after(hold_after);
        let error = published(&folders, &hub, Duration::from_millis(300)).await;
        let error = error.unwrap_err();
        assert!(matches!(error, HubError::Stalled { .. }), "{error}");
        let said = error.to_string();
        assert!(said.contains("my_lora.safetensors stood still"), "{said}");
    }
}

#[tokio::test]
async fn a_storage_that_does_not_answer_once_is_asked_again() {
    let (hub, folders) = (HubStandIn::start().await, Folders::new());
    let folder = training(&folders);
    hub.state().silent = 1;
    let published = published(&folders, &hub, Duration::from_secs(4)).await;
    assert_eq!(published.unwrap().files.len(), 4);
    assert!(hub.count("PUT ") > 2);
    holds_all_of(&hub.repository("alice/pots"), &folder);
}

#[tokio::test]
async fn a_file_that_changes_while_it_goes_up_is_not_published() {
    // More than fits into what is on its way: its end is not read yet when it changes.
    const SIZE: u64 = 48 << 20;
    for change in ["written", "cut off"] {
        let (hub, folders) = (HubStandIn::start().await, Folders::new());
        let path = training(&folders).join("my_lora.safetensors");
        let model = fs::File::options().write(true).open(path).unwrap();
        model.set_len(SIZE).unwrap();
        let modified = model.metadata().unwrap().modified().unwrap();
        hub.hold_after(100_000);
        let running = publishes(&folders, &hub).spawn().unwrap();
        wait_for("the upload", || (hub.received() >= 100_000).then_some(())).await;
        match change {
            "written" => {
                model.write_all_at(b"changed", SIZE - 100).unwrap();
                // By somebody who sets its time back.
                model.set_modified(modified).unwrap();
            }
            _ => model.set_len(SIZE - 100).unwrap(),
        }
        hub.hold_after(u64::MAX);
        let output = timeout(PATIENCE, running.wait_with_output()).await;
        let line = failure(&output.unwrap().unwrap());
        assert!(
            line.contains("my_lora.safetensors") && line.contains("changed meanwhile"),
            "{change}: {line}"
        );
        assert!(hub.repository("alice/pots").commits.is_empty());
    }
}
