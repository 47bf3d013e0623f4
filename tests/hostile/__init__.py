"""Hostile jobs: real attacks from inside real jobs, and each with that one protection left out, where it succeeds.

What is tried, where, and what shows that it would succeed otherwise:

    /etc/shadow, keys, records of others          test_layers             mask, uid, root left out, each alone
    mounts, namespaces, roots, devices, modules,  test_layers, _filter    uid, capabilities, seccomp, proc left out, each alone
    keys, raw sockets, /proc/sys, cgroups
    setuid programs                               test_layers             no_new_privs and nosuid left out
    ptrace, signals, memory of the host's         test_processes          the same program on the host
    mounts, namespaces, processes by new queries  test_queries            the same program on the host
    sockets and terminals of the host             test_sockets            network, root and uid left out
    output in a stranger's hands                  test_sockets            what he writes arrives while the job lives
    fork bombs                                    test_exhaustion         without limits
    the same, beside others, without end          test_neighbours         the limit lifted, below one of the test's own
    memory: pages, files, shm, sockets            test_exhaustion         without limits
    descriptors, inodes, bytes of /tmp and /work  test_exhaustion         a larger size; quotas: tests/vm/test_quota
    a flood of output                             test_exhaustion         all of it is kept
    the same, beside others, on a small disk      test_neighbours         all of it is kept: no other job is started
    tables that the host has once                 test_host_tables        seccomp left out
    the helper: /proc/1, its descriptors, a       test_layers, _requests, uid, capabilities, seccomp left out; that such names are
    forged end, itself executed in a job          _processes              followed; what the server's own probe may do
    ends: background, sessions, SIGSTOP, signals  test_processes          the same program on the host
    what is left in /work: links, depth, names,   test_leavings           another way to walk; seccomp left out (btrfs)
    subvolumes, a stranger in it
    links and renames: volumes, workspaces        tests/library/test_{volume,workspace}_attacks, which see that the trap is laid
    the root, also where it is by chroot(2)       test_roots              what holds is left out, one by one

All of it runs on this host, in the virtual machine (tests/vm) and in the container (tests/docker).
"""
