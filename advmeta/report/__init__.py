"""What a person reads of a run: the transfer table, plots, and one self-contained HTML page."""

from advmeta.report.folder import compare as compare
from advmeta.report.folder import write as write
from advmeta.report.tables import checks as checks
from advmeta.report.tables import markdown as markdown
from advmeta.report.tables import table as table
