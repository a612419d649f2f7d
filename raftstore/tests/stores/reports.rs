//! What placement is told of a region by the peer that leads it.

use esker_model::{StoreId, Traffic};
use esker_raftstore::RequestContext;

use crate::cluster::{Cluster, value};

/// What the last report of a store said of region 1, if it made one.
fn reported(cluster: &Cluster, store: u64) -> Option<Traffic> {
    let reports = cluster.machines[&StoreId(store)].sent.reports.lock();
    reports.get(&1).map(|report| report.traffic)
}

#[test]
fn a_new_leader_reports_what_was_written_and_read_since_it_leads() {
    let mut cluster = Cluster::replicated();
    cluster.transfer(1, 1);
    for n in 0..50 {
        cluster.put(&format!("key-{n:02}"), "value");
    }
    let region = cluster.region_of(b"key-00");
    let context = RequestContext { replica_read: true, ..Cluster::context(&region) };
    let mut answer = cluster.start_read(2, &region, context);
    cluster.settle();
    assert!(value(&answer.try_recv().unwrap().unwrap(), "key-00").is_some());
    cluster.await_agreement(&[1, 2, 3]);
    assert!(reported(&cluster, 2).is_none(), "store 2 has never led");
    cluster.transfer(1, 2);
    cluster.run_until("store 2 reports", |cluster| reported(cluster, 2).is_some());
    assert_eq!(reported(&cluster, 2), Some(Traffic::default()), "its predecessor's traffic");
    cluster.put("key-50", "value");
    let own = Traffic { bytes_written: 11, keys_written: 1, ..Traffic::default() };
    cluster.run_until("its own is reported", |cluster| reported(cluster, 2) == Some(own));
}
