"""Thin typed kernel calls: cgroups, disks, inotify, facts of the host."""
