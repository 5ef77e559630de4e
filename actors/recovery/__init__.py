"""Snapshots in memory and the recovery points that they make up."""
