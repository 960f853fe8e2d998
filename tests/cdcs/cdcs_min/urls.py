"""Everything that core_main_app serves, at the root, as in the NexusLIMS flavour of CDCS."""

from django.urls import include, path

urlpatterns = [path("", include("core_main_app.urls"))]
