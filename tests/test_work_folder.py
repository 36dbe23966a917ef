"""Whose work a folder holds, and who may go on with it."""

import pytest

from cli.errors import UserError
from prep import work_folder

JOB = {"settings": {"vocab_size": 300}, "sources": [["corpus.txt", 5]]}


@pytest.mark.parametrize("job", [None, [], "job", {"settings": []}, {"settings": {"vocab_size": 301}}])
def test_a_job_that_is_none_or_another_is_one_line(job):
    """metadata.json and job.json may be anybody's."""
    with pytest.raises(UserError, match="--vocab-size"):
        work_folder.same_job(job, JOB, "corpus-tokens")


def test_the_same_job_goes_on():
    work_folder.same_job({**JOB, "versions": {}}, JOB, "corpus-tokens")
