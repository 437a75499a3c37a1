"""Hosts: other people's engines that run our layers."""
