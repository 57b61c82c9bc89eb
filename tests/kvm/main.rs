//! Real guests through the public API: every test here boots at least one virtual machine.
//!
//! Where the machine has no hardware KVM, cargo's runner takes this program into the lab (lab/README.md). Nothing is
//! skipped silently: without KVM every test fails and says what to do. With COFFERDAM_WITHOUT_KVM=1 they are counted
//! and printed as ignored.

#![allow(clippy::expect_used, reason = "a failure here is the test's")]

mod boot;
mod bounds;
mod calls;
mod cgroup;
mod connect;
mod container;
mod cpu;
mod disk;
mod ends;
mod exec;
mod faults;
mod fixture;
mod gateway;
#[path = "../../examples/gateway/main.rs"]
#[allow(dead_code, reason = "the program's own arguments")]
mod gateway_example;
mod hostile;
mod images;
mod kernels;
mod lifecycle;
mod many;
mod memory;
mod net;
mod odd;
mod overlay;
mod programs;
#[path = "../../examples/proxy_command.rs"]
mod proxy_command;
mod relays;
mod start;
mod storage;
mod tally;
#[path = "../../src/boot/tiny.rs"]
mod tiny;
mod wires;

use std::collections::HashSet;
use std::io::Write;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use cofferdam::Host;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

/// A test, under its name.
type Test = (&'static str, fn() -> Result<(), Failed>);

/// Names the functions of a module as tests.
macro_rules! tests {
    ($($module:ident: $($name:ident)*;)*) => {
        const TESTS: &[Test] = &[$($((concat!(stringify!($module), "::", stringify!($name)), || {
            $module::$name().map_err(|e| Failed::from(e.to_string()))
        }),)*)*];
    };
}

tests! {
    boot: vmlinux bzimage two_processors memory_around_the_hole serial_port command_line_arguments_reach_init
        a_timeline_is_kept what_a_kernel_lacks_is_named devices_by_acpi power_off_by_acpi reboot_by_acpi
        two_processors_by_acpi the_keyboard_is_heard_by_acpi acpi_off_puts_devices_on_the_command_line
        a_clock_and_a_generation by_pvh;
    bounds: a_guest_that_halts_for_good_has_ended an_idle_guest_has_not_ended
        a_container_whose_guest_powers_itself_off_was_not_killed
        a_guest_that_goes_on_does_what_it_was_told_meanwhile a_start_is_cancelled a_time_out_has_one_name_however_early
        an_end_has_one_name_whoever_waits any_duration_will_do a_programs_streams_are_its_own
        the_files_that_programs_need_are_there_whatever_the_image_has a_child_of_fork_leaves_its_parents_guests_alone
        want_of_descriptors_has_one_name no_guests_memory_is_in_children_or_core_files
        a_core_file_has_nothing_of_a_guest neither_nesting_nor_counters_by_default
        the_words_that_end_the_kernels_parameters_may_come_first;
    calls: every_call_on_a_mute_guest_comes_back every_call_on_a_babbling_guest_comes_back
        every_call_on_a_guest_whose_loop_is_busy_comes_back stuck_captures_are_waited_for_together;
    connect: services_are_reached_on_any_address each_direction_ends_by_itself
        resets_are_told_and_so_is_the_end_of_the_container whoever_does_not_read_stops_the_other_side_and_nothing_is_lost
        many_one_after_the_other_leave_nothing many_at_once_are_bounded_and_make_room_again;
    cpu: level_2_is_all_that_is_seen level_3_is_all_that_is_seen_or_what_lacks_is_named
        the_hosts_processor_written_out_is_the_same masked_bits_are_gone_from_linux_too fields_are_what_they_were_set_to
        time_never_goes_back_between_processors registers_have_their_value_or_are_hidden
        registers_that_kvm_refuses_are_named_before_anything_starts
        one_package_of_cores_with_one_thread_each caches_are_shared_as_told lscpu_agrees as_many_as_asked_for_are_online
        thirty_two_are_online all_start_or_none kvms_clock_is_the_hosts the_tsc_has_the_frequency_that_is_told
        what_others_take_is_seen_as_stolen;
    ends: power_off reboot halt panic panic_without_a_word want_of_memory device_that_is_never_reset triple_fault init_fault killed_while_it_spins dropped_while_it_spins
        ctrl_alt_del_asks_init_to_shut_down stops_and_signals_of_the_host_are_survived
        nothing_is_left_when_the_process_is_killed shutdown_ends_a_guest_that_does_not_listen the_exit_descriptor_tells
        a_stuck_console_writer_holds_nothing_up;
    cgroup: threads_have_a_group_of_their_own_and_leave_none_behind a_limit_holds_and_is_counted
        weights_divide_what_is_short where_there_is_none_the_reason_is_told;
    disk: written_and_read_back order_is_meaning read_only_is_kept one_writer_or_many_readers sizes_arrive
        serial_numbers_and_queues_arrive discards_give_space_back a_disk_grows_while_it_is_used
        limits_hold_and_can_be_changed a_full_host_holds_the_guest_until_there_is_room a_fault_can_end_the_machine
        pauses_find_nothing_under_way without_io_uring_there_are_threads
        a_file_system_is_whole_after_much_at_once;
    container: a_root_file_system_like_any_other missing_mount_points_are_made images_from_directories
        writes_are_private_and_gone_with_the_container stops_in_good_order
        stop_is_bounded_whatever_the_guest_does everything_ends_with_the_container memory_and_processors_arrive further_disks_are_there_by_their_numbers
        connecting_to_nobody_is_refused a_full_host_fails_programs_and_holds_none_up the_image_is_shared_and_stays_as_it_is
        clones_are_one_container it_pauses_and_tells_as_a_machine_does;
    exec: output_and_codes streams_are_apart environment_and_directory standard_input_ends
        a_process_reads_what_another_prints
        binary_data_survives_both_ways signals_end_processes kill_takes_all_that_was_started
        time_outs_kill_what_was_started background_processes_hold_nothing_up waiting_and_not_waiting
        what_cannot_run_is_named output_is_bounded want_of_memory_is_told many_at_once
        nothing_of_the_embedder_is_inherited a_reader_that_stops_breaks_the_pipe pid_1_survives_kill_all
        orphans_are_reaped slow_readers_lose_nothing the_end_of_the_machine_is_told large_arguments
        streams_may_be_files_and_bytes too_much_output_is_cut_off_when_asked;
    faults: a_device_that_fails_and_comes_back after_a_failed_sync_nothing_is_promised
        a_device_that_stands_still_for_half_a_minute a_file_system_that_becomes_read_only;
    gateway: each_name_reaches_its_own_guest_which_starts_and_stops_as_needed;
    hostile: queues_where_no_memory_is descriptors_in_a_loop kicks_and_interrupts_without_end miners_on_all_processors
        panics_again_and_again memory_and_disk_are_used_up a_disk_reset_in_the_middle_of_requests registers_written_at_random boot_structures_written_over a_flood_on_the_console hundreds_of_mebibytes_on_the_console
        a_fork_bomb_stays_inside a_storm_of_connections;
    images: all_that_is_odd_arrives all_that_is_odd_arrives_with_the_kernels_of_debian
        all_that_is_odd_arrives_with_a_newer_kernel_of_debian;
    kernels: debian_6_1_cloud debian_6_12_cloud debian_6_1_generic
        modules_lie_in_the_initramfs_in_their_order a_module_that_fails_is_named a_panic_is_told_though_the_kernel_would_hang
        what_a_kernel_has_in_modules_that_were_not_given_is_named modules_of_another_kernel_are_refused
        a_whole_system_boots_to_its_login_and_powers_off_when_asked;
    lifecycle: a_paused_guest_stands_still_and_goes_on nothing_is_lost_however_often_it_is_paused
        clocks_go_on_while_paused a_paused_guest_ends_when_told pauses_and_ends_race_from_many_threads
        events_tell_the_whole_life numbers_grow_with_what_the_guest_does;
    many: ten_machines_in_one_process one_machine_after_the_other_leaves_nothing_behind one_container_after_the_other_leaves_nothing_behind
        many_machines_at_once machines_that_race_from_many_threads two_kernels_side_by_side;
    memory: what_a_guest_frees_comes_back the_balloon_takes_what_it_is_told_and_gives_it_back
        a_guest_short_of_memory_takes_it_from_the_balloon asked_for_in_transparent_huge_pages
        in_a_file_that_others_may_map in_huge_pages_of_the_hosts_pool more_than_a_host_without_overcommit_promises;
    net: a_guest_and_its_host_talk_over_a_tap a_line_that_loses_repeats_and_reorders_keeps_every_byte several_queues_are_used
        a_tap_that_is_busy_or_missing_or_made_otherwise_is_named frames_on_a_socket_and_a_link_that_goes_down
        a_guest_goes_where_its_policy_lets_it_and_nowhere_else a_container_has_address_route_and_names
        published_ports_lead_into_the_guest published_ports_lead_to_services_on_any_address_but_one
        datagrams_to_published_ports_are_answered_wherever_the_service_is large_datagrams_leave_and_come_back_whole ipv6_and_ping_reach_the_outside;
    wires: two_containers_on_a_switch_talk_by_name a_limit_holds_and_is_changed what_a_guest_sends_is_captured
        a_backend_of_the_embedders_own a_backend_that_panics_ends_its_machine_alone a_backend_may_hold_its_machine a_backend_may_hold_its_container;
    overlay: three_guests_write_on_one_base_which_stays_as_it_is what_is_not_kept_is_gone_with_its_machine
        a_snapshot_is_the_base_of_others an_overlay_that_may_take_no_more_tells_the_guest
        qcow2_is_written_on_a_backing_file_which_stays_as_it_is past_the_page_cache_and_in_memory;
    programs: ssh_goes_through_a_proxy_command_into_a_guest_without_a_network
        scp_sftp_and_git_keep_every_byte_through_a_published_port clients_in_one_guest_use_servers_in_another
        databases_are_asked_by_name_across_a_switch
        iperf3_goes_all_its_ways short_connections_a_hundred_at_once_are_all_served;
    relays: a_network_is_there_at_once_and_no_round_trip_waits nothing_leaves_once_the_policy_is_withdrawn;
    start: a_guest_that_is_never_ready_names_its_stage a_guest_that_ends_first_says_how a_broken_shim_is_told
        without_kvm_the_remedy_is_told what_may_not_be_read_is_named;
    storage: fio_reads_what_it_wrote what_was_durable_survives_the_kill_of_its_process;
}

/// What takes longer than this is told.
const SLOW: Duration = Duration::from_secs(20);

fn in_lab() -> bool {
    std::env::var_os("COFFERDAM_IN_LAB").is_some_and(|lab| lab == "1")
}

/// Longer than any test takes, much longer where `COFFERDAM_SOAK` makes them long. What a process of its own runs ends before
/// its caller.
fn limit() -> Duration {
    let minutes = if fixture::soak().is_some() { 120 } else { 5 };
    Duration::from_secs(minutes * 60 - if fixture::is_alone() { 60 } else { 0 })
}

/// Runs a test to its end or for [`limit`]; then it is left behind, and what all threads do is its failure's text.
fn bounded(test: fn() -> Result<(), Failed>) -> Result<(), Failed> {
    let limit = limit();
    let (done, outcome) = mpsc::channel();
    let thread = std::thread::Builder::new().name("test".into()).spawn(move || done.send(test()))?;
    match outcome.recv_timeout(limit) {
        Ok(outcome) => outcome,
        Err(mpsc::RecvTimeoutError::Timeout) => {
            Err(format!("still not done after {limit:?}\n{}{}", threads()?, exits()).into())
        }
        Err(mpsc::RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(_) => Err("the test was dropped".into()),
        },
    }
}

/// Where each thread of this process is in the host's kernel: the top of its stack there.
fn threads() -> std::io::Result<String> {
    let mut text = String::new();
    for task in std::fs::read_dir("/proc/self/task")? {
        let path = task?.path();
        let part = |name| std::fs::read_to_string(path.join(name)).unwrap_or_default();
        let stack: Vec<_> = part("stack").lines().take(6).map(|line| line.replace("[<0>] ", "")).collect();
        text += &format!("{}: {}\n", part("comm").trim(), stack.join(" < "));
    }
    Ok(text)
}

/// What leads guests out of themselves at this moment, by the kernel's own trace, in the lab, whose kernel is ours to ask.
fn exits() -> String {
    const SCRIPT: &str = "cd /sys/kernel/tracing && { [ -e events ] || mount -t tracefs tracefs . && cd .; } && echo 1 > events/kvm/enable \
                          && sleep 0.2; echo 0 > events/kvm/enable; grep vcpu trace | tail -n 40";
    let traced = in_lab().then(|| std::process::Command::new("sh").args(["-c", SCRIPT]).output());
    traced.and_then(Result::ok).map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

/// Runs a test, and writes down what became of it.
fn tallied(name: &str, test: fn() -> Result<(), Failed>) -> Result<(), Failed> {
    let begin = Instant::now();
    let outcome = tried(name, test);
    tally::write(if outcome.is_ok() { "passed" } else { "failed" }, name, begin.elapsed());
    outcome
}

/// Runs a test. In the lab, whose emulated processors may make a guest hang (lab/README.md), one that fails is run once more
/// by itself, and both are told.
fn tried(name: &str, test: fn() -> Result<(), Failed>) -> Result<(), Failed> {
    static ALONE: Mutex<()> = Mutex::new(());
    let begin = Instant::now();
    let first = bounded(test);
    if begin.elapsed() > SLOW {
        let _ = writeln!(std::io::stderr(), "{name} took {} s", begin.elapsed().as_secs());
    }
    let failed = match first {
        Err(failed) if in_lab() && !fixture::is_alone() => failed,
        outcome => return outcome,
    };
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let why = failed.message().unwrap_or("no message");
    // Nobody may be there to read it.
    let _ = writeln!(std::io::stderr(), "{name} FAILED in the lab and is run once more: {why}");
    let second = bounded(test);
    if second.is_ok() {
        tally::write("flaked", name, begin.elapsed());
    }
    second
}

fn main() -> ExitCode {
    if let Some(path) = std::env::var_os(start::REPORT) {
        start::report(path);
        return ExitCode::SUCCESS;
    }
    if let Some(disk) = std::env::var_os(storage::VICTIM) {
        return if storage::victim(disk.as_ref()).is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    if std::env::var_os(programs::PROXY).is_some() {
        return proxy_command::main();
    }
    let mut words: Vec<_> = std::env::args().collect();
    let passed = match tally::take(&mut words).map(|path| tally::open(path.as_ref())) {
        None => HashSet::new(),
        Some(Ok(passed)) => passed,
        Some(Err(e)) => {
            let _ = writeln!(std::io::stderr(), "opening the tally: {e}");
            return ExitCode::FAILURE;
        }
    };
    if !passed.is_empty() {
        let _ =
            writeln!(std::io::stderr(), "{} tests had passed when the lab died, and are not run again", passed.len());
    }
    let mut arguments = Arguments::from_iter(words);
    // Guests compete for two processors in the lab; more at once only makes each slower.
    arguments.test_threads.get_or_insert(2);
    let without = std::env::var_os("COFFERDAM_WITHOUT_KVM").is_some_and(|v| v == "1");
    let part = std::env::var("COFFERDAM_PART").unwrap_or_default();
    let (part, parts) =
        part.split_once('/').map_or((1_usize, 1_usize), |(n, of)| (n.parse().unwrap_or(1), of.parse().unwrap_or(1)));
    let missing = Host::probe().ready().err().map(|e| e.to_string());
    let trial = |&(name, test): &Test| {
        let missing = missing.clone();
        Trial::ignorable_test(name, move || match &missing {
            None => tallied(name, test).map(|()| Completion::Completed),
            Some(why) if without => {
                tally::write("skipped", name, Duration::ZERO);
                Ok(Completion::ignored_with(why))
            }
            Some(why) => {
                Err(Failed::from(format!("{why}; run `cargo test` as it is to use the lab, see lab/README.md")))
            }
        })
    };
    let mine = TESTS.iter().skip(part.saturating_sub(1)).step_by(parts.max(1));
    libtest_mimic::run(&arguments, mine.filter(|(name, _)| !passed.contains(*name)).map(trial).collect()).exit_code()
}
