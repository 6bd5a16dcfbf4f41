"""placeholder"""


class CutRequest: ...


def cut_student(): ...
