"""Reports of training runs as HTML, Markdown and PNG."""
