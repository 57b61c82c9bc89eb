//! What a pull asks a registry for, and what the store has afterwards.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use cofferdam::image::{ImageStore, LayerPhase, LayerProgress};
use cofferdam::{ErrorKind, Size};

use super::{Server, Temp, layout, push, registry};

#[test]
fn pulled_image_is_kept_and_its_layers_are_not_asked_for_again() {
    let temp = Temp::new("again");
    let server = Server::start(&temp, "");
    push(&layout(&temp, "one", &[("a", "1"), ("b", "2")]), &server, "team/app:1", &[]);
    push(&layout(&temp, "two", &[("a", "1"), ("c", "3")]), &server, "team/app:2", &[]);
    server.asked("");

    let seen = Arc::new(Mutex::new(Vec::new()));
    let progress = seen.clone();
    let pulls = registry(&server, &temp)
        .progress(move |it: &LayerProgress| progress.lock().unwrap().push((it.layer, it.phase)));
    let image = pulls.pull(format!("{}/team/app:1", server.name)).unwrap();
    let done = |layer| seen.lock().unwrap().contains(&(layer, LayerPhase::Done));
    assert!(done(0) && done(1), "{seen:?}");
    // A configuration and two layers.
    assert_eq!(server.asked("GET /v2/team/app/blobs/"), 3);
    assert_eq!(image.config().unwrap().cmd.len(), 1);
    image.prepare().unwrap();

    // The index alone: what it names is there.
    pulls.pull(format!("{}/team/app:1", server.name)).unwrap().prepare().unwrap();
    assert_eq!(server.asked("\"GET /v2/team"), 1);

    // A layer that another image has is not asked for.
    let _ = pulls.pull(format!("{}/team/app:2", server.name)).unwrap();
    assert_eq!(server.asked("GET /v2/team/app/blobs/"), 2);

    let store = ImageStore::at(temp.path("cache"));
    let list = store.list().unwrap();
    let names: Vec<_> = list.iter().map(|it| (it.reference.repository(), it.reference.tag())).collect();
    assert_eq!(names, [("team/app", Some("1")), ("team/app", Some("2"))]);
    assert!(list.iter().all(|it| it.size > Size::bytes(0)));
    assert!(store.verify(Duration::from_secs(60)).unwrap().is_empty());

    // Without the registry it is found by its name, until it is removed.
    let name = format!("{}/team/app:1", server.name);
    drop(server);
    store.image(&name).unwrap().prepare().unwrap();
    store.remove(&name).unwrap();
    assert_eq!(store.image(&name).map(drop).unwrap_err().kind(), ErrorKind::NotFound);
    let before = store.disk_usage().unwrap();
    let collected = store.gc(Size::gib(1)).unwrap();
    assert!(collected.images.is_empty() && collected.freed > Size::bytes(0), "{collected:?}");
    assert!(store.disk_usage().unwrap() < before);
    let other = name.replace("app:1", "app:2");
    store.image(&other).unwrap().prepare().unwrap();
    store.pin(&other, true).unwrap();
    assert!(store.gc(Size::bytes(0)).unwrap().images.is_empty(), "it has a pin");
    store.pin(&other, false).unwrap();
    assert_eq!(store.gc(Size::bytes(0)).unwrap().images.len(), 1);
    assert_eq!(store.disk_usage().unwrap(), Size::bytes(0));
}

#[test]
fn image_for_another_platform_is_chosen_or_named() {
    let temp = Temp::new("platform");
    let server = Server::start(&temp, "");
    push(&layout(&temp, "one", &[("a", "1")]), &server, "app:1", &[]);
    let name = format!("{}/app:1", server.name);
    let image = registry(&server, &temp).platform("linux/s390x".parse().unwrap()).pull(&name).unwrap();
    assert_eq!(image.config().unwrap().cmd, ["/s390x"]);
    let error = registry(&server, &temp).platform("linux/riscv64".parse().unwrap()).pull(&name).map(drop).unwrap_err();
    assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains("linux/s390x"), "{error}");
    let error = registry(&server, &temp).pull(format!("{}/app:2", server.name)).map(drop).unwrap_err();
    assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains("pulling 127.0.0.1:"), "{error}");
}
