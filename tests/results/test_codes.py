"""What is printed of a code."""

from pyroelbo.results import CodeLength


def length(**changed):
    known = {"data": 4, "coded": 4, "bytes": 40, "net_bits": 80.0, "starter_data": 0, "starter_bytes": 0}
    known |= {"frame_bytes": 30, "initial_bits": 0.0, "model_bytes": 9, "seconds": 1.0, "coder_seconds": 0.0}
    return str(CodeLength(**known | changed))


def test_a_code_of_the_starter_alone_has_no_nats_by_the_model():
    text = length(coded=0, net_bits=0.0, starter_data=4, starter_bytes=10)
    assert "0 bytes for 0 data\n" in text and "nan" not in text


def test_a_site_that_gives_back_a_few_bits_is_no_minus_zero_bytes():
    text = length(site_bits={"y": 83.0, "z": -3.0})
    assert " 0 bytes, -0.520 nats per datum" in text and "-0 bytes" not in text
