"""Shared helpers: errors, exit statuses, atomic files, distributed helpers, plotting and GPU specifications."""
