"""Bases: which coordinates a site is expressed in."""
