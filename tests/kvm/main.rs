//! Real guests through the public API: every test here boots at least one virtual machine.
//!
//! Where the machine has no hardware KVM, cargo's runner takes this program into the lab (lab/README.md). Nothing is
//! skipped silently: without KVM every test fails and says what to do. With COFFERDAM_WITHOUT_KVM=1 they are counted
//! and printed as ignored.

#![allow(clippy::expect_used, reason = "a failure here is the test's")]

mod boot;
mod calls;
mod cgroup;
mod connect;
mod container;
mod cpu;
mod disk;
mod disk_faults;
mod exec;
mod exits;
mod files;
mod fixture;
mod gateway;
#[path = "../../examples/gateway/main.rs"]
#[allow(dead_code, reason = "the program's own arguments")]
mod gateway_example;
mod guarantees;
mod hostile;
mod hotplug;
mod image_config;
mod images;
mod kernels;
mod lifecycle;
mod machine_events;
mod many_vms;
mod memory;
mod net;
mod net_backends;
mod overlay;
mod privileges;
mod programs;
#[path = "../../examples/proxy_command.rs"]
mod proxy_command;
mod rebuild;
mod seccomp;
mod settings;
mod spec;
mod start_failures;
mod storage;
mod tally;
mod terminals;
#[path = "../../src/boot/x86/tiny.rs"]
mod tiny;
mod tokio;
mod unusual_image;
mod user_net;
mod volumes;

use std::collections::HashSet;
use std::io::Write;
use std::process::ExitCode;
use std::sync::{PoisonError, RwLock, mpsc};
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
    files: files_are_read_written_listed_and_described directories_are_copied_in_and_out
        a_full_disk_is_an_error_and_leaves_nothing an_image_without_programs_has_files
        programs_cannot_end_requests_and_requests_are_counted many_small_files_are_copied_fast;
    boot: vmlinux_boots bzimage_boots two_vcpus_are_online memory_below_and_above_the_mmio_hole_is_usable
        serial_console_output_reaches_the_writer command_line_arguments_reach_init boot_timeline_is_recorded
        missing_kernel_options_are_named acpi_kernel_finds_virtio_devices acpi_kernel_powers_off acpi_kernel_reboots
        acpi_kernel_starts_two_vcpus acpi_kernel_receives_ctrl_alt_del acpi_off_puts_devices_on_the_command_line
        guest_has_a_ptp_clock_and_a_vm_generation_id pvh_entry_point_boots;
    guarantees: guest_halted_with_interrupts_disabled_ends idle_guest_keeps_running
        guest_power_off_is_not_reported_as_killed request_that_timed_out_while_paused_is_not_executed
        cancelled_start_returns early_timeouts_are_reported_as_timed_out wait_after_the_vm_ended_returns_vm_ended
        longest_durations_are_accepted_as_timeouts programs_cannot_open_streams_of_others
        missing_etc_files_are_created forked_child_does_not_affect_guests descriptor_exhaustion_is_resource_exhausted
        guest_memory_is_dontfork_and_dontdump core_dump_has_no_guest_memory
        nested_virtualization_and_pmu_are_off_by_default command_line_may_begin_with_init_arguments;
    calls: every_call_returns_with_a_silent_guest every_call_returns_with_a_flooding_guest
        every_call_returns_with_a_busy_device_loop blocked_capture_writers_share_one_timeout;
    connect: connects_as_soon_as_a_service_listens connects_to_services_on_any_guest_address each_direction_shuts_down_independently
        resets_and_the_end_of_the_container_are_reported slow_reader_blocks_the_writer_without_losing_data
        sequential_connections_leak_nothing concurrent_connections_are_limited;
    cpu: level_2_guest_sees_only_x86_64_v2 level_3_guest_sees_only_x86_64_v3_or_start_names_what_is_missing
        host_profile_from_text_equals_the_host_profile masked_cpuid_bits_are_absent_in_linux
        cpuid_fields_have_the_set_values clock_is_monotonic_across_vcpus msrs_have_the_set_value_or_are_hidden
        msrs_refused_by_kvm_are_named_at_start topology_is_one_package_of_single_thread_cores
        cache_sharing_matches_the_topology lscpu_reports_the_topology configured_vcpus_are_online
        thirty_two_vcpus_are_online vcpu_threads_start_all_or_none kvm_clock_follows_the_host_clock
        tsc_runs_at_the_reported_frequency host_contention_is_reported_as_steal_time;
    exits: power_off_exits_with_power_off reboot_exits_with_reboot halt_exits_with_halt
        kernel_panic_exits_with_panic_and_its_message panic_port_write_exits_with_panic_without_a_message
        oom_of_pid_1_exits_with_panic invalid_queue_without_a_reset_exits_with_device_fault
        triple_fault_exits_with_triple_fault exit_port_write_exits_with_init_fault kill_ends_a_spinning_guest
        drop_ends_a_spinning_guest ctrl_alt_del_asks_init_to_shut_down
        guest_survives_sigstop_and_signals_of_the_process sigkill_of_the_process_leaves_nothing_behind
        shutdown_kills_an_unresponsive_guest_after_the_grace exit_descriptor_becomes_readable_at_the_end
        blocked_console_writer_does_not_delay_the_exit;
    cgroup: threads_run_in_a_cgroup_that_is_removed_at_the_end cpu_limit_holds_and_throttling_is_counted
        cpu_weights_divide_a_contended_cpu missing_cgroup_controllers_are_reported;
    disk: written_data_is_read_back disks_appear_in_the_order_of_the_builder read_only_disk_rejects_writes
        image_is_locked_for_one_writer_or_many_readers disk_capacity_is_the_configured_size
        serial_number_and_queue_count_are_visible discard_frees_host_space disk_grows_while_in_use
        rate_limits_hold_and_can_be_changed full_host_pauses_the_guest_until_space_is_freed
        error_action_stop_ends_the_vm pause_leaves_no_request_in_flight engine_falls_back_to_threads_without_io_uring
        file_system_is_consistent_after_concurrent_load;
    container: root_file_system_has_the_usual_mounts missing_mount_points_are_created directory_serves_as_an_image
        writes_are_private_and_discarded stop_sends_sigterm_and_powers_off
        stop_returns_in_time_with_an_unresponsive_guest processes_end_with_the_container
        memory_and_vcpus_are_as_configured attached_disks_are_visible_by_number connect_without_a_listener_is_refused
        full_host_fails_writes_without_blocking_programs image_is_shared_and_unchanged
        clones_are_handles_of_one_container container_pauses_and_reports_stats_like_a_vm;
    exec: output_and_exit_codes_are_returned stdout_and_stderr_are_separate environment_and_working_directory_are_set
        programs_run_as_other_users
        output_of_one_process_is_input_of_another
        closing_stdin_ends_the_input binary_data_is_unchanged_both_ways signal_ends_a_process
        kill_ends_all_descendants timeout_kills_all_descendants background_process_does_not_delay_wait
        wait_try_wait_and_wait_timeout_agree spawn_failure_names_its_cause output_beyond_the_limit_is_an_error
        oom_kill_is_reported concurrent_processes_all_finish programs_inherit_nothing_from_the_embedder
        closed_reader_breaks_the_pipe pid_1_survives_kill_all orphans_are_reaped_by_pid_1 slow_readers_lose_nothing
        end_of_the_vm_is_reported_to_waiters arguments_of_the_largest_size_are_passed stdio_from_files_and_bytes
        output_is_truncated_when_configured;
    disk_faults: guest_sees_io_errors_until_the_device_recovers every_flush_fails_after_a_failed_sync
        stalled_device_delays_only_its_own_guest read_only_file_system_fails_writes;
    gateway: each_host_name_reaches_its_own_guest_started_on_demand;
    hostile: queue_addresses_outside_memory_need_a_reset looped_descriptor_chain_needs_a_reset
        endless_kicks_do_not_starve_neighbors busy_vcpus_do_not_starve_neighbors
        repeated_panics_do_not_affect_neighbors exhausted_memory_and_disk_stay_in_the_guest
        disk_reset_with_requests_in_flight_is_survived random_register_writes_are_survived
        overwritten_boot_structures_end_the_guest_only console_flood_is_bounded
        large_console_output_uses_bounded_memory fork_bomb_stays_in_the_guest connection_storm_is_bounded;
    image_config: nginx_serves_and_quits_by_its_stop_signal postgres_runs_as_its_user_and_stops_by_its_signal
        redis_runs_in_its_directory_as_user_and_group others_get_sigterm_once_the_program_of_the_image_has_ended
        python_serves_and_ends_by_its_stop_signal nodejs_serves_and_stops_by_its_signal
        java_serves_and_its_shutdown_hook_runs
        stop_signal_of_the_image_is_for_its_program_alone;
    images: layers_are_one_root_file_system unusual_files_are_intact unusual_files_are_intact_with_debian_kernels
        unusual_files_are_intact_with_a_newer_debian_kernel;
    kernels: debian_6_1_cloud_kernel_runs_a_container debian_6_12_cloud_kernel_runs_a_container
        debian_6_1_generic_kernel_runs_a_container modules_are_loaded_in_dependency_order failing_module_is_named
        panic_is_reported_with_panic_0 missing_modules_are_named modules_of_another_kernel_are_rejected
        full_debian_system_boots_to_login_and_powers_off;
    lifecycle: paused_guest_makes_no_progress_until_resumed repeated_pauses_lose_no_data clocks_advance_while_paused
        devices_of_a_paused_vm_take_calls_and_go_on paused_guest_can_be_killed pause_and_kill_race_from_many_threads events_report_the_whole_lifecycle
        stats_grow_with_guest_activity;
    many_vms: ten_vms_run_in_one_process sequential_vms_leak_nothing sequential_containers_leak_nothing
        concurrent_vms_all_run vms_start_and_end_from_many_threads two_kernels_run_side_by_side;
    memory: freed_guest_memory_returns_to_the_host balloon_inflates_and_deflates_to_its_target
        guest_under_memory_pressure_deflates_the_balloon transparent_huge_pages_are_requested
        memfd_memory_can_be_mapped_by_others hugetlb_memory_comes_from_the_pool
        memory_beyond_the_commit_limit_is_resource_exhausted;
    net: tap_connects_guest_and_host tcp_keeps_every_byte_over_a_lossy_link multiple_queues_carry_traffic
        container_with_a_small_mtu_runs_on_ipv4
        unusable_tap_is_named socket_carries_frames_and_link_goes_down_with_it policy_limits_where_the_guest_connects
        container_has_address_route_and_resolver published_ports_reach_the_guest
        published_ports_reach_services_on_any_guest_address published_udp_ports_are_answered_from_any_guest_address
        fragmented_datagrams_are_intact_both_ways ipv6_and_ping_reach_the_host;
    net_backends: containers_on_a_switch_connect_by_name net_rate_limit_holds_and_can_be_changed
        capture_records_guest_frames custom_backend_carries_frames panicking_backend_ends_only_its_own_vm
        backend_whose_drop_hangs_does_not_delay_its_vm
        backend_may_own_its_vm backend_may_own_its_container;
    overlay: three_guests_share_one_unchanged_base non_persistent_overlay_is_discarded
        frozen_overlay_is_a_base_of_others overlay_at_its_max_size_fails_writes
        qcow2_write_leaves_the_backing_file_unchanged direct_and_memory_disks_keep_data;
    programs: ssh_proxy_command_reaches_a_guest_without_network scp_sftp_and_git_work_through_a_published_port
        http_clients_and_git_in_two_guests_work apt_and_dns_in_two_guests_work
        websockets_work_and_other_addresses_are_refused databases_are_reached_by_name_over_a_switch iperf3_runs_in_all_modes
        hundred_concurrent_short_connections_are_served;
    machine_events: running_debian_6_12_learns_of_each_new_generation
        kernels_without_acpi_learn_of_a_new_generation_by_the_shim power_button_is_pressed_by_stop;
    hotplug: disks_are_replaced_while_the_guest_runs network_cards_are_replaced_while_the_guest_runs
        a_disk_in_use_can_be_detached;
    rebuild: rebuilt_guest_keeps_its_data_and_clocks rebuilt_guest_of_four_vcpus_keeps_its_data_and_clocks
        rebuilt_debian_kernel_keeps_its_data_and_clocks rebuilt_debian_kernel_of_four_vcpus_keeps_its_data_and_clocks
        rebuilds_during_boot_do_not_disturb_it rebuilt_vm_stays_paused_until_resumed
        rebuild_and_kill_race_from_many_threads rebuild_without_descriptors_fails_and_the_guest_goes_on;
    spec: vm_from_text_has_disk_network_and_console;
    user_net: network_is_up_at_start_and_round_trips_have_no_delay withdrawn_policy_stops_all_traffic;
    start_failures: start_timeout_names_the_boot_stage guest_exit_before_ready_is_reported shim_failure_is_reported
        missing_kvm_error_names_the_remedy unreadable_file_is_named;
    terminals: shell_in_a_terminal_echoes_controls_jobs_and_ends resized_terminal_signals_its_program
        end_of_a_terminals_input_and_hang_up_reach_the_program terminals_keep_all_output_and_leave_nothing_behind
        editor_pager_top_and_tmux_draw_on_the_screen
        reader_that_is_stuck_in_a_terminal_holds_up_its_own_program_alone;
    privileges: groups_are_added_to_those_of_the_user cgroup_limits_hold_for_a_program_and_its_children
        resource_limits_are_inherited_by_children capabilities_and_new_privileges_are_taken_away;
    volumes: volumes_outlive_containers_and_have_one_writer volumes_of_killed_containers_recover_and_volumes_grow
        directories_are_volumes_of_many_containers a_kept_layer_is_what_the_next_container_begins_with;
    seccomp: denied_calls_fail_in_a_program_and_its_children calls_that_kill_end_the_program_by_sigsys
        programs_that_may_not_begin_are_errors_or_killed ordinary_programs_run_under_a_profile_of_dockers_form;
    settings: programs_have_the_environment_user_and_directory_of_the_builder
        memory_file_systems_have_their_size_and_mode read_only_root_takes_writes_in_memory_alone
        secrets_are_in_memory_alone_and_read_only names_of_hosts_and_servers_are_written
        kernel_parameters_are_set_or_named;
    tokio: fifty_programs_and_all_ends_are_awaited_on_one_thread dropped_futures_lose_no_output
        end_of_the_container_wakes_every_task output_to_a_file_is_complete_after_wait;
    storage: fio_verifies_written_data flushed_data_survives_sigkill_of_the_process;
}

/// A test that takes longer than this is reported.
const SLOW: Duration = Duration::from_secs(20);

fn in_lab() -> bool {
    std::env::var_os("COFFERDAM_IN_LAB").is_some_and(|lab| lab == "1")
}

/// Longer than any test takes, much longer where `COFFERDAM_SOAK` makes them long. What a process of its own runs ends before
/// its caller.
fn limit() -> Duration {
    let minutes = if fixture::soak().is_some() { 120 } else { 8 };
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

/// Tests that take minutes, and of which others test the most important part; `make soak` runs them.
const SOAKED: &[&str] = &[
    "image_config::python_serves_and_ends_by_its_stop_signal",
    "image_config::nodejs_serves_and_stops_by_its_signal",
    "image_config::java_serves_and_its_shutdown_hook_runs",
    "images::unusual_files_are_intact_with_a_newer_debian_kernel",
    "images::unusual_files_are_intact_with_debian_kernels",
    "programs::databases_are_reached_by_name_over_a_switch",
];

/// Runs a test, and writes down what became of it.
fn tallied(name: &str, test: fn() -> Result<(), Failed>) -> Result<(), Failed> {
    let begin = Instant::now();
    let outcome = run_with_lab_retry(name, test);
    tally::write(if outcome.is_ok() { "passed" } else { "failed" }, name, begin.elapsed());
    outcome
}

/// Tests that no other runs beside: two at once on the lab's one processor keep each other from being in time. A name that is no
/// test's is an error.
const ALONE: &[&str] = &[
    "gateway::each_host_name_reaches_its_own_guest_started_on_demand",
    "images::unusual_files_are_intact",
    "images::unusual_files_are_intact_with_a_newer_debian_kernel",
    "images::unusual_files_are_intact_with_debian_kernels",
    "kernels::full_debian_system_boots_to_login_and_powers_off",
    "lifecycle::repeated_pauses_lose_no_data",
    "net_backends::containers_on_a_switch_connect_by_name",
    "programs::apt_and_dns_in_two_guests_work",
    "programs::http_clients_and_git_in_two_guests_work",
    "programs::scp_sftp_and_git_work_through_a_published_port",
    "programs::websockets_work_and_other_addresses_are_refused",
    "rebuild::rebuilt_debian_kernel_keeps_its_data_and_clocks",
    "rebuild::rebuilt_debian_kernel_of_four_vcpus_keeps_its_data_and_clocks",
    "rebuild::rebuilt_guest_keeps_its_data_and_clocks",
    "rebuild::rebuilt_guest_of_four_vcpus_keeps_its_data_and_clocks",
    "terminals::editor_pager_top_and_tmux_draw_on_the_screen",
    "user_net::network_is_up_at_start_and_round_trips_have_no_delay",
];

/// Shared by tests that run side by side, held by one that runs alone.
static PROCESSOR: RwLock<()> = RwLock::new(());

/// Runs a test. In the lab, whose emulated processors may make a guest hang (lab/README.md), one that fails is run once more
/// by itself, and both runs are reported.
fn run_with_lab_retry(name: &str, test: fn() -> Result<(), Failed>) -> Result<(), Failed> {
    let alone = || PROCESSOR.write().unwrap_or_else(PoisonError::into_inner);
    let beside = || PROCESSOR.read().unwrap_or_else(PoisonError::into_inner);
    let (lone, beside) = if ALONE.contains(&name) { (Some(alone()), None) } else { (None, Some(beside())) };
    let begin = Instant::now();
    let first = bounded(test);
    drop(beside);
    if begin.elapsed() > SLOW {
        let _ = writeln!(std::io::stderr(), "{name} took {} s", begin.elapsed().as_secs());
    }
    let failed = match first {
        Err(failed) if in_lab() && !fixture::is_alone() => failed,
        outcome => return outcome,
    };
    let _lone = lone.unwrap_or_else(alone);
    let why = failed.message().unwrap_or("no message");
    // Standard error may be closed.
    let _ = writeln!(std::io::stderr(), "{name} FAILED in the lab and is run once more: {why}");
    let second = bounded(test);
    if second.is_ok() {
        tally::write("flaked", name, begin.elapsed());
    }
    second
}

fn main() -> ExitCode {
    if let Some(path) = std::env::var_os(start_failures::REPORT) {
        start_failures::report(path);
        return ExitCode::SUCCESS;
    }
    if let Some(disk) = std::env::var_os(storage::VICTIM) {
        return if storage::victim(disk.as_ref()).is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    if std::env::var_os(programs::PROXY).is_some() {
        return proxy_command::main();
    }
    if let Some(unknown) = ALONE.iter().chain(SOAKED).find(|name| !TESTS.iter().any(|(known, _)| known == *name)) {
        let _ = writeln!(std::io::stderr(), "no test is called {unknown}");
        return ExitCode::FAILURE;
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
    if fixture::soak().is_none() {
        let _ = writeln!(std::io::stderr(), "left to `make soak`: {}", SOAKED.join(", "));
    }
    let listed = TESTS.iter().filter(|(name, _)| fixture::soak().is_some() || !SOAKED.contains(name));
    let mine = listed.skip(part.saturating_sub(1)).step_by(parts.max(1));
    libtest_mimic::run(&arguments, mine.filter(|(name, _)| !passed.contains(*name)).map(trial).collect()).exit_code()
}
