"""The offline work behind the tools."""
